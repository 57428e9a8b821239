"""What does not run is told at load, in one line with the sizes that contradict each other."""

import re

import pytest
from transformers import PreTrainedModel

from cllm_core.errors import ModelLoadError
from cllm_core.models.attention import PAGED_ATTENTION, register_paged_attention
from cllm_core.models.paged import LayerSpec
from cllm_core.models.probe import probe_layers
from tests.tiny_models import build_tiny, tiny_config


def paged(model_type: str, **settings: object) -> PreTrainedModel:
    register_paged_attention()
    model = build_tiny(tiny_config(model_type, **settings))
    model.set_attn_implementation(PAGED_ATTENTION)
    return model


def test_every_layer_tells_what_it_stores() -> None:
    assert probe_layers(paged("llama")) == [LayerSpec(2, 16, 16)] * 4
    assert probe_layers(paged("deepseek_v3"))[0] == LayerSpec(4, 24, 16)


def test_sizes_that_contradict_each_other_are_one_line() -> None:
    """LongCat-Flash with a head size that its rope does not fit was a traceback."""
    with pytest.raises(ModelLoadError) as caught:
        probe_layers(paged("longcat_flash", head_dim=16))
    message = str(caught.value)
    assert re.search(
        r"does not run as its config says \(.*head_dim=16.*qk_rope_head_dim=8.*\): .*size of tensor", message
    )
    assert "\n" not in message


def test_a_model_that_needs_more_than_tokens_is_one_line() -> None:
    """Xmod wants a language, and its decoder form was a traceback."""
    with pytest.raises(ModelLoadError, match=r"XmodForCausalLM does not run as its config says .* language unknown"):
        probe_layers(paged("xmod", is_decoder=True, default_language=None))


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("bert", "BertSelfAttention attends to later tokens too"),
        ("doge", "DogeAttention brings an attention mask of its own"),
        ("diffllama", "layer 0 attends more than once"),
        ("hrm_text", "attends more than once"),
    ],
)
def test_attention_that_the_cache_does_not_know_is_refused(model_type: str, reason: str) -> None:
    model = paged(model_type)
    with pytest.raises(ModelLoadError, match=reason):
        probe_layers(model)
    assert model.config._attn_implementation == PAGED_ATTENTION


def test_a_window_that_only_the_mask_knows_is_refused_where_a_text_can_be_longer() -> None:
    """Qwen2-MoE's sliding layers do not tell their attention, which would have seen everything."""
    window = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2}
    with pytest.raises(ModelLoadError, match=r"Qwen2MoeAttention masks a window of 24 tokens and tells .* all"):
        probe_layers(paged("qwen2_moe", **window))
    assert len(probe_layers(paged("qwen2_moe", **window | {"sliding_window": 512}))) == 4
