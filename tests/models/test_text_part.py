"""Of a multimodal checkpoint the text is served: towers are left out by name, and nothing else changes."""

import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMultimodalLM

from cllm_core import LLM, SamplingParams
from cllm_core.config import EngineConfig
from cllm_core.errors import ModelLoadError
from cllm_core.models.architecture import check_architecture
from cllm_core.models.checkpoint import Checkpoint, read_config, stored_dtype
from cllm_core.models.loader import load_model
from tests.checkpoints import build_tokenizer
from tests.matrix import prompts, reference_logprobs
from tests.tiny_models import MAX_POSITIONS, build_tiny, tiny_config

# By model type: what is left out.
LEFT_OUT = {
    "gemma3": {"model.vision_tower", "model.multi_modal_projector"},
    "mistral3": {"model.vision_tower", "model.multi_modal_projector"},
    "qwen2_5_vl": {"model.visual"},
    "qwen3_vl": {"model.visual"},
    "qwen2_audio": {"model.multi_modal_projector"},  # text asks its tower for the device
    "voxtral": {"model.audio_tower", "model.multi_modal_projector"},
}


@pytest.fixture(params=LEFT_OUT)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny checkpoint of each family."""
    folder: Path = tmp_path / request.param
    model = build_tiny(tiny_config(request.param))
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def test_towers_are_left_out_by_name_and_text_keeps_its_numbers(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    loaded = load_model(EngineConfig(model=str(folder), device="cpu", dtype="float32"), lambda stage, fraction: None)
    whole = AutoModelForMultimodalLM.from_pretrained(folder)
    names = LEFT_OUT[folder.name]
    assert all(name in caplog.text for name in names)
    missing = whole.state_dict().keys() - loaded.model.state_dict().keys()
    assert missing
    assert all(key.startswith(tuple(f"{name}." for name in names)) for key in missing)
    assert loaded.max_model_len == MAX_POSITIONS

    llm = LLM(str(folder), device="cpu", dtype="float32", num_cache_blocks=32, max_model_len=128)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    for prompt in prompts():
        (result,) = llm.generate([list(prompt)], params, progress=False)
        found = torch.tensor([entry.logprob for entry in result.outputs[0].prompt_logprobs])
        torch.testing.assert_close(found, reference_logprobs(whole, prompt), atol=1e-3, rtol=0)


def test_it_can_be_neither_trained_nor_exported(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    with pytest.raises(ModelLoadError, match="not a text-only model"):
        check_architecture(checkpoint, read_config(checkpoint), attention="sdpa")


def test_precision_may_stand_with_the_text_model_alone(folder: Path) -> None:
    config = read_config(Checkpoint(folder))
    config.dtype = None
    config.get_text_config(decoder=True).dtype = torch.bfloat16
    assert stored_dtype(Checkpoint(folder), config) == torch.bfloat16
