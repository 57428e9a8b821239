"""A rope whose frequencies follow the length of a text keeps those of the longest text that is served."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from cllm_core.errors import ModelLoadError
from cllm_core.models.ropes import fix_ropes, longest_context, rope_types, stated_context
from tests.tiny_models import MAX_POSITIONS, build_tiny, tiny_config

ORIGINAL = 32
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 1.5 * i for i in range(8)],
    "original_max_position_embeddings": ORIGINAL,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}


def model_with(rope: dict[str, object], *, max_positions: int = 512) -> PreTrainedModel:
    config = tiny_config("llama", rope_parameters=dict(rope), max_position_embeddings=max_positions)
    return build_tiny(config)


@torch.inference_mode()
def logits(model: PreTrainedModel, length: int) -> torch.Tensor:
    ids = torch.randint(3, 384, (1, length), generator=torch.Generator().manual_seed(3))
    found: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return found


@pytest.mark.parametrize("rope", [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
def test_the_longest_text_decides_and_no_other(rope: dict[str, object]) -> None:
    """Unfixed, the first 20 tokens of a long text differ from the same 20 alone."""
    max_positions = 512 if rope is LONGROPE else 32
    loose, fixed = model_with(rope, max_positions=max_positions), model_with(rope, max_positions=max_positions)
    long = 90
    expected = logits(loose, long)
    fix_ropes(fixed, long)
    torch.testing.assert_close(logits(fixed, long), expected)
    torch.testing.assert_close(logits(fixed, 20), logits(fixed, long)[:20])
    assert not torch.allclose(logits(loose, 20), expected[:20], atol=1e-2)


@pytest.mark.parametrize("rope", [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
def test_within_the_original_length_transformers_own_numbers_hold(rope: dict[str, object]) -> None:
    fixed, loose = model_with(rope), model_with(rope)
    fix_ropes(fixed, ORIGINAL)
    torch.testing.assert_close(logits(fixed, 20), logits(loose, 20))


def test_a_rope_that_goes_by_the_length_in_its_own_way_is_refused_beyond_the_first_length() -> None:
    """PhiMoE scales by the largest position of a forward pass, whatever its frequencies are."""
    rope = LONGROPE | {"short_mscale": 1.1, "long_mscale": 1.3}
    fix_ropes(build_tiny(tiny_config("phimoe", rope_parameters=rope)), ORIGINAL)
    with pytest.raises(ModelLoadError, match="PhimoeRotaryEmbedding goes by the longest text"):
        fix_ropes(build_tiny(tiny_config("phimoe", rope_parameters=rope)), 512)


def test_frequencies_that_are_no_numbers_are_refused() -> None:
    """A factor of 0 was served, with a text of nothing but token 0."""
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 0.0}
    with pytest.raises(ModelLoadError, match=r"rotary_emb: its frequencies are not finite; correct rope_parameters"):
        fix_ropes(model_with(rope), 512)


def test_a_rope_that_does_not_follow_the_length_is_left_alone() -> None:
    model = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=384))
    before = model.model.rotary_emb.inv_freq.clone()
    fix_ropes(model, 100_000)
    assert torch.equal(model.model.rotary_emb.inv_freq, before)


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        (None, 512),
        (LONGROPE, 512),
        (DYNAMIC, 2048),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, 1024),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}, 512),
    ],
    ids=["default", "longrope", "dynamic", "linear", "yarn", "yarn-stated"],
)
def test_context_reaches_as_far_as_the_rope_is_stretched(rope: dict[str, object] | None, longest: int) -> None:
    assert longest_context(tiny_config("llama", rope_parameters=rope)) == longest


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [("llama", {}), ("mpt", {}), ("gpt2", {}), ("bloom", {"seq_length": MAX_POSITIONS})],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_context_is_found_by_whatever_name_the_config_has_for_it(model_type: str, settings: dict[str, int]) -> None:
    assert stated_context(tiny_config(model_type, **settings)) == MAX_POSITIONS


def test_every_kind_of_layer_tells_its_rope() -> None:
    config = tiny_config(
        "gemma3_text",
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        },
    )
    assert rope_types(config) == ("default", "linear")
    assert rope_types(tiny_config("gpt2")) == ()
