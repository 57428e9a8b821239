"""A model of the first layers computes what the whole model has behind them."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cllm_core.errors import ConfigError
from cllm_core.models.cllm_json import read_card
from tests.architectures import Architecture
from tests.checkpoints import ARCHITECTURES
from tests.conftest import CheckpointFactory
from tests.export.conftest import Export
from tests.models.conftest import Load


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_first_layers_give_what_the_whole_model_has_behind_them(
    export: Export, load: Load, tiny_checkpoint: CheckpointFactory, tmp_path: Path, architecture: Architecture
) -> None:
    folder = export(tiny_checkpoint(architecture), tmp_path / "out", layers=1)
    whole = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(architecture))
    short = AutoModelForCausalLM.from_pretrained(folder)
    text = torch.arange(3, 43)[None]  # longer than the window of those that have one
    with torch.no_grad():
        behind_first = whole(text, output_hidden_states=True).hidden_states[1]
        expected = whole.get_output_embeddings()(whole.get_decoder().norm(behind_first))
        torch.testing.assert_close(short(text).logits, expected)
    assert short.config.num_hidden_layers == 1
    assert load(folder).model.config.num_hidden_layers == 1


def test_it_claims_nothing_of_the_training_of_the_whole(export: Export, adapter: Path, tmp_path: Path) -> None:
    folder = export(adapter, tmp_path / "out", layers=1)
    assert read_card(folder) is None
    assert "The first 1 layers alone" in (folder / "README.md").read_text()


def test_numbers_of_layers_that_cannot_be_had_are_refused(export: Export, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="layers=3: the model has 2; give fewer"):
        export(tiny_llama, tmp_path / "out", layers=3)
    with pytest.raises(ConfigError, match="layers=0: must be >= 1"):
        export(tiny_llama, tmp_path / "out", layers=0)
    assert not (tmp_path / "out").exists()
