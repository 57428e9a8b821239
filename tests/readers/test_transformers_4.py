"""transformers 4 and PEFT compute from what is written here what transformers 5 computes, and what is served.

TRANSFORMERS_4 in the environment is the path of a Python that has both; `make test-readers` makes one.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cllm_core.training.config import DataConfig, ModelConfig, SftConfig, WeightsConfig
from cllm_core.training.run import run_sft
from tests.export.conftest import Export, export  # noqa: F401 - a fixture here, too
from tests.gguf_models import CONFIGS, write_model
from tests.models.conftest import Load, load  # noqa: F401 - a fixture here, too
from tests.training.factories import make_run, make_sft, no_progress, write_questions

PYTHON = os.environ.get("TRANSFORMERS_4")
SCRIPT = Path(__file__).with_name("load_with_transformers_4.py")
TEXT = "<|im_start|>user\nThe server reads 42 naïve tokens.<|im_end|>"
MAX_DIFFERENCE = 1e-4  # nats

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="TRANSFORMERS_4 names no Python that has transformers 4"),
]


def read(folder: Path, *adapter: Path) -> dict[str, Any]:
    """What transformers 4 makes of the folder."""
    words = [str(PYTHON), str(SCRIPT), str(folder), TEXT, *map(str, adapter)]
    found: dict[str, Any] = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    assert found["release"].startswith("4.")
    return found


@torch.no_grad()
def require_equal_logprobs(theirs: dict[str, Any], model: torch.nn.Module) -> None:
    ours = torch.log_softmax(model(torch.tensor([theirs["prompt"]])).logits[0, -1], dim=-1)
    assert (torch.tensor(theirs["logprobs"]) - ours).abs().max() < MAX_DIFFERENCE


@pytest.mark.parametrize("name", CONFIGS)
def test_it_reads_an_exported_folder(
    export: Export,  # noqa: F811 - the fixture
    tmp_path: Path,
    name: str,
) -> None:
    folder = export(write_model(tmp_path / "source", name), tmp_path / "folder")
    theirs, tokenizer = read(folder), AutoTokenizer.from_pretrained(folder)
    assert theirs["ids"] == tokenizer(TEXT)["input_ids"]
    assert theirs["special_tokens"] == tokenizer.special_tokens_map
    assert theirs["chat_template"] == tokenizer.chat_template
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    require_equal_logprobs(theirs, model)


def test_it_reads_fully_trained_weights(
    load: Load,  # noqa: F811 - the fixture
    tiny_llama: Path,
    tmp_path: Path,
) -> None:
    config = SftConfig(
        model=ModelConfig(model=str(tiny_llama), output=tmp_path / "out"),
        data=DataConfig(data=str(write_questions(tmp_path))),
        run=make_run(max_steps=2),
        weights=WeightsConfig(full=True),
    )
    folder = run_sft(config, no_progress)
    theirs = read(folder)
    assert theirs["ids"] == AutoTokenizer.from_pretrained(tiny_llama)(TEXT)["input_ids"]
    require_equal_logprobs(theirs, load(folder).model)


def test_its_peft_reads_a_trained_adapter_on_an_exported_base(
    export: Export,  # noqa: F811 - the fixture
    load: Load,  # noqa: F811 - the fixture
    tiny_llama: Path,
    tmp_path: Path,
) -> None:
    adapter = run_sft(make_sft(tiny_llama, write_questions(tmp_path), tmp_path / "out", max_steps=8), no_progress)
    base = export(tiny_llama, tmp_path / "base")
    theirs = read(base, adapter)
    require_equal_logprobs(theirs, load(tiny_llama, adapter=str(adapter), dtype="float32").model)
    plain = torch.tensor(read(base)["logprobs"])
    assert (torch.tensor(theirs["logprobs"]) - plain).abs().max() > 10 * MAX_DIFFERENCE
