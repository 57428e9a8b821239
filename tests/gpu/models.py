"""Small random models on a CUDA device, and engines over them as a server builds them."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config

from cllm_core.config import EngineConfig
from cllm_core.engine.build import assemble_engine
from cllm_core.engine.engine import Engine
from cllm_core.info import TokenizerBundle
from cllm_core.models.attention import PAGED_ATTENTION, register_paged_attention
from cllm_core.models.loader import LoadedModel
from tests.checkpoints import draw_weights

VOCAB_SIZE = 1024
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
LLAMA = LlamaConfig(**_SHAPE)
QWEN3 = Qwen3Config(**_SHAPE, head_dim=64)


def loaded_model(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> LoadedModel:
    register_paged_attention()
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=PAGED_ATTENTION)
    draw_weights(model, seed=0)
    model = model.to(device).eval().requires_grad_(False)
    return LoadedModel(
        model=model,
        tokenizer=TokenizerBundle(tokenizer_json=""),
        eos_token_ids=(),
        name="random",
        block_length=None,
        domain=None,
        max_model_len=1024,
        device=model.device,
        dtype=dtype,
    )


def make_engine(loaded: LoadedModel, *, graphs: bool, max_batched_tokens: int = 256) -> Engine:
    config = EngineConfig(
        max_num_seqs=8,
        max_batched_tokens=max_batched_tokens,
        num_cache_blocks=400,
        adaptive_block_length=False,
        cuda_graphs=graphs,
    )
    return assemble_engine(config, loaded, lambda stage, fraction: None)
