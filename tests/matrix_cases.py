"""The cases of the matrix: every causal architecture that transformers knows, and what can be switched in them."""

from dataclasses import dataclass, field
from typing import Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from tests.tiny_models import WINDOW


@dataclass(frozen=True, slots=True)
class Case:
    """An architecture, with settings that differ from its default."""

    model_type: str
    variant: str = ""
    settings: dict[str, Any] = field(default_factory=dict, hash=False, compare=False)

    @property
    def name(self) -> str:
        """Of the case: the architecture's name in transformers, and what is switched."""
        return f"{self.model_type}, {self.variant}" if self.variant else self.model_type

    @property
    def class_name(self) -> str:
        """Of the model."""
        if self.model_type in MULTIMODAL:
            return MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[self.model_type]
        return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.model_type]


MULTIMODAL = frozenset(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES) - {"fuyu", "git"}
"""Of these the text part is served."""

_ALTERNATING = ["sliding_attention", "full_attention"] * 2

# Encoders with a form that attends to earlier tokens alone.
_DECODER_FORMS = (
    *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
    *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"),
)

_VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    **{model_type: {"is_decoder": {"is_decoder": True}} for model_type in _DECODER_FORMS},
    "cohere": {"use_qk_norm": {"use_qk_norm": True}},
    "falcon": {
        "alibi": {"alibi": True},
        "new_decoder_architecture": {"new_decoder_architecture": True, "multi_query": False},
        "sequential": {"parallel_attn": False, "multi_query": False, "num_kv_heads": 4, "bias": True},
    },
    "gemma3n_text": {"num_kv_shared_layers": {"num_kv_shared_layers": 2}},
    "glm4_moe": {"use_qk_norm": {"use_qk_norm": True}},
    "gpt2": {
        "scale_attn_by_inverse_layer_idx": {"scale_attn_by_inverse_layer_idx": True},
        "scale_attn_weights off": {"scale_attn_weights": False},
    },
    "gpt_bigcode": {"multi_query off": {"multi_query": False}},
    "gpt_neox": {
        "use_parallel_residual off": {"use_parallel_residual": False},
        "attention_bias off": {"attention_bias": False},
    },
    "lfm2": {"conv": {"layer_types": ["conv", "full_attention"] * 2, "full_attn_idxs": None}},
    "llama": {
        "biases": {"attention_bias": True, "mlp_bias": True},
        "tied": {"tie_word_embeddings": True},
        "one KV head": {"num_key_value_heads": 1},
        "as many KV heads": {"num_key_value_heads": 4},
        "wide heads": {"head_dim": 32},
    },
    "mistral": {"no window": {"sliding_window": None}},
    "mixtral": {"sliding_window": {"sliding_window": WINDOW}},
    "mpt": {"clip_qkv": {"attn_config": {"clip_qkv": 1.0}}},
    "olmo": {"clip_qkv": {"clip_qkv": 1.0}},
    "olmoe": {"clip_qkv": {"clip_qkv": 1.0}},
    "opt": {
        "do_layer_norm_before off": {"do_layer_norm_before": False},
        "word_embed_proj_dim": {"word_embed_proj_dim": 32},
    },
    "persimmon": {"qk_layernorm off": {"qk_layernorm": False}},
    "phi": {"qk_layernorm": {"qk_layernorm": True}},
    "phi3": {"sliding_window": {"sliding_window": WINDOW}},
    "phimoe": {"attention_bias": {"attention_bias": True, "lm_head_bias": True}},
    "qwen2": {
        "sliding_window": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    },
    "qwen2_moe": {
        "sliding_window": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    },
    "qwen3": {
        "sliding_window": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
        "attention_bias": {"attention_bias": True},
    },
    "qwen3_moe": {"sliding_window": {"use_sliding_window": True, "sliding_window": WINDOW}},
    "smollm3": {"sliding_window": {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _ALTERNATING}},
    "stablelm": {
        "qk_layernorm": {"qk_layernorm": True},
        "use_parallel_residual": {"use_parallel_residual": True, "use_qkv_bias": True},
    },
    "starcoder2": {"sliding_window": {"sliding_window": WINDOW}},
}


_DEFAULT: dict[str, dict[str, Any]] = {"": {}}


def all_cases() -> list[Case]:
    """Every architecture of the installed transformers as it is by default, each followed by its variants."""
    known = dict.fromkeys((*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *sorted(MULTIMODAL)))
    return [
        Case(model_type, variant, settings)
        for model_type in known
        for variant, settings in (_DEFAULT | _VARIANTS.get(model_type, {})).items()
    ]
