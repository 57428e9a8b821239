"""Tiny configurations of every causal architecture that transformers knows, and random weights that hide nothing.

A configuration is the architecture's own default with its sizes made small (`_SIZES`), so that an architecture that
transformers learns tomorrow needs no line here unless it has sizes of its own; those are in `_OWN_SIZES`. Weights are
drawn from N(0, 0.2), norms from N(1, 0.2), biases too, so that a weight that is dropped changes the result.
"""

import dataclasses
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from cllm_core.models.checkpoint import is_multimodal
from tests.checkpoints import ENDOFTEXT_ID, IM_END_ID, IM_START_ID, VOCAB_SIZE

MAX_POSITIONS = 512
WINDOW = 24
FIRST_MEDIA_ID = 340
"""From here on tokens may stand for images and sounds."""

_WEIGHT_STD = 0.2
_MAX_PARAMETERS = 30_000_000


def _each(*names: str, size: Any) -> dict[str, Any]:
    return dict.fromkeys(names, size)


_SIZES: dict[str, Any] = {
    **_each("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size", size=VOCAB_SIZE),
    **_each("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "word_embed_proj_dim", size=64),
    **_each("input_embedding_size", "output_embedding_size", "lru_width", "embedding_dim", "d_embed", size=64),
    **_each("intermediate_size", "ffn_dim", "dff", "decoder_ffn_dim", "encoder_ffn_dim", "d_inner", size=96),
    **_each("ffn_hidden_size", "dense_intermediate_size", "intermediate_size_mlp", "feed_forward_size", size=96),
    **_each("dim_ff", size=96),
    **_each("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size", size=32),
    **_each("shared_intermediate_size", "prefix_dense_intermediate_size", size=32),
    **_each("num_hidden_layers", "n_layer", "n_layers", "num_layers", size=4),
    **_each("decoder_layers", "num_decoder_layers", "encoder_layers", "num_encoder_layers", size=2),
    **_each("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", size=4),
    **_each("swa_num_attention_heads", "decoder_attention_heads", "encoder_attention_heads", size=4),
    **_each("num_decoder_attention_heads", "num_encoder_attention_heads", size=4),
    **_each("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", size=2),
    **_each("head_dim", "dim_head", "d_head", "kv_channels", "swa_head_dim", "attention_head_dim", size=16),
    **_each("qk_rope_head_dim", "rotary_dim", size=8),
    **_each("qk_nope_head_dim", "v_head_dim", size=16),
    **_each("kv_lora_rank", "q_lora_rank", "o_lora_rank", size=16),
    **_each("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts", size=4),
    **_each("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", size=2),
    **_each("n_group", "topk_group", "num_expert_group", size=1),
    **_each("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length", size=MAX_POSITIONS),
    **_each("model_max_length", "max_target_positions", size=MAX_POSITIONS),
    **_each("sliding_window", "sliding_window_size", "window_size", "attention_window_size", size=WINDOW),
    **_each("local_attention", size=2 * WINDOW),
    "query_pre_attn_scalar": 16,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.3,
    "logits_scaling": 2.0,
    "first_k_dense_replace": 1,
    "index_topk": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "pad_token_id": ENDOFTEXT_ID,
    "bos_token_id": IM_START_ID,
    "eos_token_id": IM_END_ID,
}

# Left as it is where the default is None: setting it would turn something on.
_OPTIONAL = {"sliding_window", "q_lora_rank", "first_k_dense_replace", "top_k_experts", "unpadded_vocab_size"}

_WINDOWED = ["sliding_attention", "full_attention"] * 2
_ROPES_BY_LAYER = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
}

_OWN_SIZES: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"layer_types": _WINDOWED, "rope_parameters": _ROPES_BY_LAYER},
    "dbrx": {
        "n_heads": 4,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 2.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96, "moe_top_k": 2},
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": {"mlp_layer_types": ["dense", "sparse"] * 2},
    "gemma3n_text": {
        "intermediate_size": [96] * 4,
        "layer_types": _WINDOWED,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0] * 4,
        "hidden_size_per_layer_input": 16,
        "laurel_rank": 8,
    },
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "longcat_flash": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "phi4_multimodal": {
        "audio_config": {
            "num_blocks": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "nemo_conv_channels": 32,
        },
        "vision_config": {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2},
    },
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}


# Of the towers beside the text model of a multimodal one.
_TOWER_SIZES: dict[str, Any] = {
    **_each("hidden_size", "embed_dim", "d_model", "dim", "intermediate_size", "encoder_ffn_dim", size=32),
    **_each("num_hidden_layers", "depth", "num_layers", "encoder_layers", "num_attention_heads", "num_heads", size=2),
    **_each("encoder_attention_heads", size=2),
    "vocab_size": 64,
    "image_size": 28,
    "patch_size": 14,
    "out_hidden_size": 64,
    "max_position_embeddings": 64,
}

_SECTIONED_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}

# Settings of the text model inside of a multimodal one.
_OWN_TEXT_SIZES: dict[str, dict[str, Any]] = {
    **_each("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", size={"rope_parameters": _SECTIONED_ROPE}),
    **_each("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker", size={"rope_parameters": _SECTIONED_ROPE}),
    **_each("paddleocr_vl", size={"rope_parameters": _SECTIONED_ROPE}),
    **_each("glm4v", "glm4v_moe", "glm46v", size={"rope_parameters": _SECTIONED_ROPE | {"partial_rotary_factor": 1.0}}),
    **_each("glm_ocr", "glmga", size={"rope_parameters": _SECTIONED_ROPE | {"partial_rotary_factor": 1.0}}),
    "step3p7": {"sliding_window": WINDOW},
}


def tiny_config(model_type: str, **settings: Any) -> PreTrainedConfig:
    """The architecture's default configuration with small sizes.

    Args:
        model_type: transformers' name of the architecture.
        settings: that differ from these.
    """
    config_class = CONFIG_MAPPING[model_type]
    own = {**_OWN_SIZES.get(model_type, {}), **settings}
    parts = {} if own.keys() & config_class.sub_configs else _tiny_parts(model_type, config_class)
    config: PreTrainedConfig = config_class(**{**_tiny_sizes(config_class), **parts, **own})
    return config


def _tiny_sizes(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Those of `_SIZES` that this class has."""
    defaults = _defaults(config_class)
    chosen = {name: size for name, size in _SIZES.items() if not _is_left(name, defaults)}
    if "qk_rope_head_dim" in chosen:  # the size of a head follows from those of its parts
        chosen.pop("head_dim", None)
        chosen["num_key_value_heads"] = chosen["num_attention_heads"]
    return chosen


def _tiny_parts(model_type: str, config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Configurations of a multimodal model's parts, and ids below the vocabulary's size for images and sounds."""
    if not config_class.sub_configs:
        return {}
    whole = config_class()
    text = whole.get_text_config(decoder=True)
    if text is whole:
        return {}
    parts: dict[str, Any] = {}
    for name in config_class.sub_configs:
        part = getattr(whole, name, None)
        if part is text:
            sizes = _tiny_sizes(type(text)) | _OWN_SIZES.get(text.model_type, {}) | _OWN_TEXT_SIZES.get(model_type, {})
            parts[name] = {"model_type": text.model_type, **sizes}
        elif part is not None:
            defaults = _defaults(type(part))
            parts[name] = {key: size for key, size in _TOWER_SIZES.items() if key in defaults}
            parts[name]["model_type"] = part.model_type
    ids = [name for name in _defaults(config_class) if name.endswith(("_token_id", "_token_index"))]
    return parts | {name: FIRST_MEDIA_ID + index for index, name in enumerate(ids)}


def _defaults(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(config_class)}


def _is_left(name: str, defaults: dict[str, Any]) -> bool:
    return name not in defaults or (name in _OPTIONAL and defaults[name] is None)


def build_tiny(config: PreTrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    """A random model in float32, in eval mode; the same seed gives the same weights."""
    auto_class: Any = AutoModelForMultimodalLM if is_multimodal(config) else AutoModelForCausalLM
    with torch.device("meta"):
        num_parameters = sum(weight.numel() for weight in auto_class.from_config(config).parameters())
    if num_parameters > _MAX_PARAMETERS:
        raise ValueError(f"not tiny: {num_parameters / 1e6:.0f} million parameters")
    torch.manual_seed(seed)  # of what an architecture draws itself: buffers
    model: PreTrainedModel = auto_class.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if parameter.ndim == 1 and not name.endswith("bias") else 0.0
            parameter.normal_(mean, _WEIGHT_STD, generator=generator)
    model.eval()
    return model
