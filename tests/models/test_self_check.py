"""The self-check tells a model that would be served wrong from one that is only rounded otherwise."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cllm_core.config import EngineConfig
from cllm_core.errors import ModelLoadError
from cllm_core.models import loader, proven
from cllm_core.models.attention import PAGED_ATTENTION, register_paged_attention
from cllm_core.models.check_rows import CheckTexts
from cllm_core.models.checkpoint import Checkpoint
from cllm_core.models.loader import load_model
from cllm_core.models.proven import Proven, find_gap
from cllm_core.models.ropes import fix_ropes
from cllm_core.models.self_check import NUM_TOKENS, Difference, compare_with_transformers, require_equal
from tests.architectures import Architecture
from tests.checkpoints import ARCHITECTURES, build_model
from tests.models.test_ropes import LONGROPE, model_with


def paged(model: PreTrainedModel) -> PreTrainedModel:
    register_paged_attention()
    model.set_attn_implementation(PAGED_ATTENTION)
    return model


def compare(model: PreTrainedModel, num_tokens: int = NUM_TOKENS) -> Difference:
    found, _ = compare_with_transformers(model, CheckTexts.draw(model, num_tokens))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_served_right_passes_and_stays_as_it_was(architecture: Architecture, dtype: torch.dtype) -> None:
    """In bfloat16 too the two are compared in float32: rounding to 16 bits would hide a difference of 0.1 nats."""
    model = paged(build_model(architecture))
    model.to(dtype=dtype)  # type: ignore[call-arg]  # transformers' wrapper hides the signature
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    found = compare(model)
    assert found.is_rounding
    assert found.nats < 1e-3
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == dtype for name in before)
    assert model.config._attn_implementation == PAGED_ATTENTION


@pytest.mark.parametrize("num_tokens", [2, 7, 200])
def test_texts_of_any_length_pass(num_tokens: int) -> None:
    assert compare(paged(build_model("mistral")), num_tokens).is_rounding


def test_a_layer_that_looks_at_its_neighbours_is_found() -> None:
    """As a convolution does, whose state beyond keys and values the cache does not keep."""
    model = paged(build_model("llama"))

    def add_previous(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        previous = torch.cat((torch.zeros_like(hidden[:, :1]), hidden[:, :-1]), dim=1)
        return hidden + previous, *args[1:]

    model.get_decoder().layers[0].register_forward_pre_hook(add_previous)
    with pytest.raises(ModelLoadError, match=r"odd: LlamaForCausalLM would be served wrong: .* [0-9.]+ nats in "):
        require_equal(model, name="odd", max_model_len=100)


def test_a_window_that_does_not_reach_the_cache_is_found() -> None:
    model = paged(build_model("qwen2-sliding"))
    for layer in model.get_decoder().layers:
        layer.self_attn.sliding_window = None
    with pytest.raises(ModelLoadError, match="masks a window of 24 tokens and tells its attention all"):
        compare(model)


def test_a_rope_that_follows_its_company_is_found_and_a_fixed_one_passes() -> None:
    model = paged(model_with(LONGROPE))
    assert compare(model).nats > 0.05
    fix_ropes(model, 512)
    assert compare(model).is_rounding


def test_a_result_that_is_no_number_does_not_pass() -> None:
    model = paged(build_model("llama"))
    with torch.no_grad():
        model.get_output_embeddings().weight[7, 0] = float("nan")
    assert not compare(model).is_rounding


def test_a_model_that_transformers_cannot_run_says_so() -> None:
    model = paged(build_model("llama"))

    def refuse(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        if "paged" not in kwargs:
            raise RuntimeError("needs a GPU")

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    with pytest.raises(ModelLoadError, match="transformers itself does not run it: needs a GPU; --skip-self-check"):
        compare(model)
    assert model.config._attn_implementation == PAGED_ATTENTION


def load(folder: Path, **settings: object) -> None:
    config = EngineConfig(model=str(folder), device="cpu", **settings)  # type: ignore[arg-type]
    load_model(config, lambda stage, fraction: None)


def test_only_what_no_test_proves_is_checked(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    monkeypatch.setattr(loader, "require_equal", lambda model, name, **_: checked.append(name))
    load(tiny_llama)
    assert checked == []
    monkeypatch.setattr(proven, "read_proven", lambda: Proven((5, 0), (99, 0), {}, []))
    load(tiny_llama, skip_self_check=True)
    assert checked == []
    load(tiny_llama)
    assert checked == [str(tiny_llama)]


@pytest.mark.parametrize(
    ("listed", "gap"),
    [
        (Proven((5, 0), (5, 1), {"LlamaForCausalLM": ["default"]}, []), r"transformers 5\.0 to 5\.1"),
        (Proven((99, 0), (99, 1), {"LlamaForCausalLM": ["default"]}, []), r"transformers 99\.0 to 99\.1"),
        (Proven((5, 0), (99, 0), {"LlamaForCausalLM": ["yarn"]}, []), "a rope of type default"),
        (Proven((5, 0), (99, 0), {"Qwen2ForCausalLM": ["default"]}, []), "do not compare LlamaForCausalLM"),
    ],
    ids=["newer transformers", "older transformers", "another rope", "another architecture"],
)
def test_what_the_list_does_not_name_is_not_proven(listed: Proven, gap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proven, "read_proven", lambda: listed)
    assert re.search(gap, find_gap(build_model("llama"), Checkpoint(Path())) or "")


def test_file_format_and_code_of_the_checkpoint_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proven, "read_proven", lambda: Proven((5, 0), (99, 0), {"LlamaForCausalLM": ["default"]}, []))
    model = build_model("llama")
    assert find_gap(model, Checkpoint(Path())) is None
    assert "GGUF files of llama" in (find_gap(model, Checkpoint(Path(), gguf_file="model.gguf")) or "")
    monkeypatch.setattr(model.config, "quantization_config", {"quant_method": "fp8"}, raising=False)
    assert find_gap(model, Checkpoint(Path())) == "its weights are quantised"
    monkeypatch.setattr(type(model), "__module__", "transformers_modules.own")
    assert "code of the checkpoint's own" in (find_gap(model, Checkpoint(Path())) or "")


def test_the_embedded_model_needs_no_check() -> None:
    """It would make every start slower."""
    listed = proven.read_proven()
    assert "default" in listed.ropes["LlamaForCausalLM"]
    assert listed.oldest <= proven.installed_release() <= listed.newest
