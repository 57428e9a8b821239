"""Small random checkpoints, written as transformers would write real ones: the models of every test without a download.

Weights are drawn wide enough that the two best logits are rarely close and greedy output does not fall into one token
(`tests/models/test_checkpoints.py` checks both), so that "equal token for token" is a meaningful law in fp32.
"""

import json
from pathlib import Path
from typing import Any, get_args

import peft
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from cllm_core.export.config import ExportConfig
from cllm_core.export.run import export_model
from tests.architectures import Architecture

ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)

VOCAB_SIZE = 384
MAX_POSITIONS = 512
SLIDING_WINDOW = 24
ENDOFTEXT_ID, IM_START_ID, IM_END_ID = 0, 1, 2
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_MERGE_TEXT = """
A server reads the request, asks the model for the next tokens, and streams the answer back to the client. The client
reads the stream, shows the tokens as they arrive, and asks again. Every token that the model predicts is checked
against the draft; the tokens that match are accepted, the others are predicted again in the next iteration.
The answer to the question is the number of tokens that were accepted in the iteration before the last one.
"""
_WEIGHT_STD = 0.3
_NORM_STD = 0.1


def write_checkpoint(folder: Path, architecture: Architecture, *, seed: int = 0) -> Path:
    """Write config, weights (fp32 safetensors), tokenizer and generation config to `folder`, and return it."""
    build_model(architecture, seed=seed).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def build_model(architecture: Architecture, *, seed: int = 0) -> PreTrainedModel:
    """A random model in fp32; the same seed gives the same weights."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(_config(architecture), dtype=torch.float32)
    draw_weights(model, seed=seed)
    model.generation_config = GenerationConfig(eos_token_id=[IM_END_ID, ENDOFTEXT_ID], pad_token_id=ENDOFTEXT_ID)
    model.eval()
    return model


def draw_weights(model: torch.nn.Module, *, seed: int) -> None:
    """Overwrite all weights: matrices around 0, norms around 1, biases around 0 (so that a lost bias is noticed)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, _WEIGHT_STD, generator=generator)
            else:
                parameter.normal_(0.0 if name.endswith("bias") else 1.0, _NORM_STD, generator=generator)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of VOCAB_SIZE tokens that can spell any text, with a ChatML template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_MERGE_TEXT.split("\n"), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        chat_template=CHATML_TEMPLATE,
        model_max_length=MAX_POSITIONS,
    )


def _config(architecture: Architecture) -> PreTrainedConfig:
    shape: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": False,
        "bos_token_id": IM_START_ID,
        "eos_token_id": IM_END_ID,
        "pad_token_id": ENDOFTEXT_ID,
    }
    match architecture:
        case "llama":
            return LlamaConfig(**shape)
        case "mistral":
            return MistralConfig(**shape, head_dim=16, sliding_window=SLIDING_WINDOW)
        case "qwen2":
            return Qwen2Config(**shape)
        case "qwen2-sliding":
            shape["num_hidden_layers"] = 3
            # the first max_window_layers layers see everything, those after them only the window
            return Qwen2Config(**shape, use_sliding_window=True, sliding_window=SLIDING_WINDOW, max_window_layers=1)
        case "qwen3":
            return Qwen3Config(**shape, head_dim=16)


def write_gguf(path: Path, checkpoint: Path) -> Path:
    """Write the tiny Llama checkpoint as a float32 GGUF file, and return its path."""
    config = ExportConfig(model=str(checkpoint), output=path, format="gguf", dtype="f32")
    return export_model(config, lambda stage, fraction: None)


def write_adapter(folder: Path, base_folder: Path, *, base: str | None = None, seed: int = 1, **lora: object) -> Path:
    """Write a LoRA adapter with random weights for the checkpoint in `base_folder`, and return its folder.

    Args:
        folder: to write to.
        base_folder: of the checkpoint that gives the shapes.
        base: what the adapter calls its base; None is `base_folder`.
        seed: of the weights.
        lora: settings of peft.LoraConfig that differ from these, and `std` of the weights; 0 changes nothing.
    """
    std = float(lora.pop("std", _WEIGHT_STD))  # type: ignore[arg-type]
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
        **lora,
    }
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, std, generator=generator)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    # Named only now: PEFT would ask the Hub about a base that it cannot find on the disk.
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = base or str(base_folder)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
