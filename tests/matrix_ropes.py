"""Every type of rope under every architecture that has one: in pieces on the paged cache, against transformers."""

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from cllm_core.models.attention import PAGED_ATTENTION, register_paged_attention
from cllm_core.models.check_rows import CheckTexts
from cllm_core.models.checkpoint import quiet
from cllm_core.models.own_attention import has_own_attention, teach_paging
from cllm_core.models.ropes import fix_ropes, rope_types
from cllm_core.models.self_check import compare_with_transformers
from tests.matrix_cases import Case
from tests.tiny_models import MAX_POSITIONS, build_tiny, tiny_config

NUM_TOKENS = 100
_MAX_ERROR = 1e-3  # nats
_ORIGINAL = 32  # tokens that the models were first trained with, by their configs

_SETTINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": MAX_POSITIONS // 4},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": _ORIGINAL,
    },
    "longrope": {"original_max_position_embeddings": _ORIGINAL},
}


def equal_ropes(case: Case) -> list[str]:
    """Types of rope, of the architecture's own and all others, with which it is served as transformers computes it.

    Types that transformers does not build or run for this architecture are left out as those that differ.
    """
    default = tiny_config(case.model_type, **case.settings)
    own = rope_types(default.get_text_config(decoder=True))
    if not own:
        return [""]
    num_frequencies = _num_frequencies(build_tiny(default))
    others = [kind for kind in _SETTINGS if kind not in own and _is_equal(case, kind, num_frequencies)]
    return sorted([*own, *others])


def _is_equal(case: Case, kind: str, num_frequencies: int) -> bool:
    try:
        model = build_tiny(_with_rope(case, kind, num_frequencies))
    except Exception:  # whatever transformers raises for a rope that this architecture cannot have
        return False
    register_paged_attention()
    with quiet():
        model.set_attn_implementation(PAGED_ATTENTION)
    if has_own_attention(type(model)):
        teach_paging(model)
    try:
        fix_ropes(model, 2 * MAX_POSITIONS if kind == "dynamic" else MAX_POSITIONS)
        found, _ = compare_with_transformers(model, CheckTexts.draw(model, NUM_TOKENS))
    except Exception:  # a line of ours, or what the architecture's rope raises without settings of its own
        return False
    return found.nats <= _MAX_ERROR


def _with_rope(case: Case, kind: str, num_frequencies: int) -> PreTrainedConfig:
    """The tiny configuration with this rope in all layers; what else its rope's settings say stays."""
    config = tiny_config(case.model_type, **case.settings)
    text_config = config.get_text_config(decoder=True)
    extra: dict[str, Any] = {"rope_type": kind, **_SETTINGS[kind]}
    if kind == "longrope":
        extra["short_factor"] = [1.0 + 0.1 * index for index in range(num_frequencies)]
        extra["long_factor"] = [2.0 + 1.5 * index for index in range(num_frequencies)]
    parameters = dict(text_config.rope_parameters)
    by_layer = {name: value for name, value in parameters.items() if isinstance(value, dict)}
    if by_layer:
        text_config.rope_parameters = parameters | {name: value | extra for name, value in by_layer.items()}
    else:
        text_config.rope_parameters = parameters | extra
    return config


def _num_frequencies(model: PreTrainedModel) -> int:
    """Frequencies of the first rotary embedding found."""
    return next((len(buffer) for name, buffer in model.named_buffers() if name.endswith("inv_freq")), 0)
