"""The tiny checkpoints are fit for exact comparisons: no near ties, no collapse, a tokenizer that spells any text."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.architectures import Architecture
from tests.checkpoints import ARCHITECTURES, VOCAB_SIZE
from tests.conftest import CheckpointFactory

FP32_NOISE = 1e-4  # well above what another order of summation changes in a logit


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_greedy_output_is_varied_and_its_logits_are_well_separated(
    tiny_checkpoint: CheckpointFactory, architecture: Architecture
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(architecture))
    ids = torch.randint(3, VOCAB_SIZE, (8, 20), generator=torch.Generator().manual_seed(1))
    margins = []
    for _ in range(40):
        best = model(ids).logits[:, -1].topk(2)
        margins.append(best.values[:, 0] - best.values[:, 1])
        ids = torch.cat([ids, best.indices[:, :1]], dim=1)
    assert torch.stack(margins).min() > FP32_NOISE
    assert min(len(set(row.tolist())) for row in ids[:, 20:]) >= 15


def test_tokenizer_spells_any_text(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    text = "The next token: naïve café 日本語 🙂\n\t"
    ids = tokenizer(text).input_ids
    assert len(tokenizer) == VOCAB_SIZE
    assert len(ids) < len(text.encode())
    assert tokenizer.decode(ids) == text
