"""Which architectures the paged model takes, seen when it is built and not when a client waits."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GptOssConfig,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3NextConfig,
)

from cllm_core.errors import ModelLoadError
from cllm_core.models.attention import PAGED_ATTENTION, register_paged_attention
from cllm_core.request import SamplingParams
from tests.backends.factories import plain
from tests.engine.factories import decode_one, engine_over, greedy_ar, make_request

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


def tiny_model(config: PreTrainedConfig, attention: str = PAGED_ATTENTION) -> PreTrainedModel:
    register_paged_attention()
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.set_attn_implementation(attention)
    model.eval()
    return model


def test_linear_attention_layers_are_refused_by_their_type() -> None:
    config = Qwen3NextConfig(**TINY, num_experts=2, layer_types=["linear_attention", "full_attention"])
    with pytest.raises(ModelLoadError, match="layers of type linear_attention: not supported"):
        plain(tiny_model(config))


@pytest.mark.parametrize(
    ("config", "features"),
    [
        (Gemma2Config(**TINY, attn_logit_softcapping=None, sliding_window=6), ()),
        (Gemma2Config(**TINY, attn_logit_softcapping=0.5, sliding_window=6), ("logit softcap",)),
        (GptOssConfig(**TINY, num_local_experts=2, num_experts_per_tok=1, sliding_window=6), ("attention sinks",)),
    ],
    ids=["windows alone", "logit softcap", "attention sinks"],
)
def test_layers_that_take_turns_in_their_window_run_like_transformers(
    config: PreTrainedConfig, features: tuple[str, ...]
) -> None:
    assert config.layer_types == ["sliding_attention", "full_attention"]
    assert {spec.features for spec in plain(tiny_model(config)).layers} == {features}
    request = make_request("a", range(2, 20), SamplingParams(temperature=0, max_tokens=16, ignore_eos=True))
    reference = tiny_model(config, "eager")
    reference.generation_config.eos_token_id = None
    expected = greedy_ar(reference, request.prompt_ids, 16)
    assert decode_one(engine_over(tiny_model(config)), request).token_ids == expected


def test_a_model_without_attention_is_refused() -> None:
    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with pytest.raises(ModelLoadError, match="layers of type linear_attention: not supported"):
        plain(model)
