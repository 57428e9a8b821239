"""Tiny random models of every architecture that GGUF files are read and written as.

Weights come from N(0, 0.2), norms from N(1, 0.2) and biases are there too, so that nothing that is dropped goes unseen.
Rotary embeddings are scaled, and windows are, so that a text of 90 tokens shows them.
"""

from pathlib import Path
from typing import Any, Final

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    Starcoder2Config,
)

from tests.checkpoints import ENDOFTEXT_ID, IM_END_ID, IM_START_ID, VOCAB_SIZE, build_tokenizer

MAX_POSITIONS: Final = 512
_STD: Final = 0.2
_SHAPE: Final[dict[str, Any]] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "bos_token_id": IM_START_ID,
    "eos_token_id": [ENDOFTEXT_ID, IM_END_ID],
    "pad_token_id": ENDOFTEXT_ID,
    "tie_word_embeddings": False,
}
_FACTORS: Final = [1.0, 1.1, 1.3, 1.7, 2.0, 2.5, 3.1, 4.0]  # of 8 pairs of dimensions


def rope(kind: str, **parameters: object) -> dict[str, Any]:
    """`rope_parameters` of this type, with the base 10000."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


def longrope(**parameters: object) -> dict[str, Any]:
    """Factors for texts within the original context, and others for longer ones."""
    factors = {"short_factor": _FACTORS, "long_factor": [2 * factor for factor in _FACTORS]}
    return rope("longrope", **factors, original_max_position_embeddings=MAX_POSITIONS // 2, **parameters)


_LLAMA3: Final = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_GEMMA_ROPE: Final = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
}

CONFIGS: Final[dict[str, PreTrainedConfig]] = {
    "llama-2": LlamaConfig(**_SHAPE | {"num_key_value_heads": 4}),
    "llama-3.1": LlamaConfig(**_SHAPE, **rope("llama3", original_max_position_embeddings=8192, **_LLAMA3)),
    "llama-3-short": LlamaConfig(**_SHAPE, **rope("llama3", original_max_position_embeddings=64, **_LLAMA3)),
    "llama-linear": LlamaConfig(**_SHAPE, **rope("linear", factor=4.0)),
    "llama-yarn": LlamaConfig(**_SHAPE, **rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "llama-longrope": LlamaConfig(**_SHAPE, **longrope(factor=2.0)),
    "llama-biased": LlamaConfig(**_SHAPE, attention_bias=True, mlp_bias=True),
    "llama-wide-heads": LlamaConfig(**_SHAPE, head_dim=32),
    "smollm": LlamaConfig(**_SHAPE | {"tie_word_embeddings": True}),
    "mistral": MistralConfig(**_SHAPE, head_dim=16, sliding_window=None),
    "smollm-3": SmolLM3Config(**_SHAPE | {"num_hidden_layers": 5}),
    "granite": GraniteConfig(
        **_SHAPE,
        attention_multiplier=0.3,
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        logits_scaling=2.0,
    ),
    "qwen2.5": Qwen2Config(**_SHAPE),
    "qwen2.5-yarn": Qwen2Config(**_SHAPE, **rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "qwen3": Qwen3Config(**_SHAPE, head_dim=32),
    "gemma": GemmaConfig(**_SHAPE | {"tie_word_embeddings": True}, head_dim=32),
    "gemma-2": Gemma2Config(
        **_SHAPE | {"tie_word_embeddings": True},
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=16,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=4.0,
    ),
    "gemma-3": Gemma3TextConfig(
        **_SHAPE | {"tie_word_embeddings": True, "num_hidden_layers": 7},
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=16,
        rope_parameters=_GEMMA_ROPE,
    ),
    "phi-3": Phi3Config(**_SHAPE, original_max_position_embeddings=MAX_POSITIONS, **rope("default")),
    "phi-3-windowed": Phi3Config(
        **_SHAPE, original_max_position_embeddings=MAX_POSITIONS, sliding_window=20, **rope("default")
    ),
    "phi-3.5": Phi3Config(**_SHAPE, original_max_position_embeddings=MAX_POSITIONS // 2, **longrope()),
    "phi-4-mini": Phi3Config(
        **_SHAPE | {"num_attention_heads": 2},
        original_max_position_embeddings=MAX_POSITIONS // 2,
        **longrope(partial_rotary_factor=0.5),
    ),
    "starcoder2": Starcoder2Config(**_SHAPE),
}


def write_model(folder: Path, name: str) -> Path:
    """Write the model of CONFIGS with a tokenizer to `folder`, in float32, and return it."""
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            mean = 1.0 if key.endswith("norm.weight") else 0.0
            parameter.normal_(mean, _STD, generator=generator)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def random_tokens(length: int) -> torch.Tensor:
    """[1, length] int64, always the same for a length."""
    return torch.randint(3, VOCAB_SIZE, (1, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def log_probabilities(model: torch.nn.Module, length: int) -> torch.Tensor:
    """[1, length, V] of `random_tokens`."""
    return torch.log_softmax(model(random_tokens(length)).logits, dim=-1)
