"""What a training leaves behind: weights and cllm.json, with the facts of the run and the model card beside them."""

from collections.abc import Mapping
from pathlib import Path

import peft
import safetensors.torch
import torch
from torch import Tensor

from cllm_core.models.cllm_json import FORMAT_VERSION, CllmCard, write_card
from cllm_core.models.saving import save_model, save_tokenizer
from cllm_core.training.card import TrainingFacts, write_facts
from cllm_core.training.trainable import TrainableModel

_ADAPTER_FILE = "adapter_model.safetensors"
_PREFIX = "causal_lm."  # of parameter names in PackedModel


def write_result(folder: Path, trainable: TrainableModel, weights: Mapping[str, Tensor], facts: TrainingFacts) -> None:
    """Write the trained weights with everything beside them.

    Args:
        folder: exists.
        trainable: the model that was trained.
        weights: from `ConsistencyTrainer.gather_weights`.
        facts: for the card.
    """
    if trainable.peft_model is not None:
        _write_adapter(folder, trainable, trainable.peft_model, weights)
    else:
        _write_weights(folder, trainable, weights)
    write_card(
        folder,
        CllmCard(
            format_version=FORMAT_VERSION,
            block_length=facts.block_length,
            domain=facts.domain,
            base=facts.base,
            gated=facts.gated,
        ),
    )
    write_facts(folder, facts)


def _write_adapter(
    folder: Path, trainable: TrainableModel, model: peft.PeftModel, weights: Mapping[str, Tensor]
) -> None:
    named = {f"base_model.model.{name.removeprefix(_PREFIX)}": value for name, value in weights.items()}
    state = peft.get_peft_model_state_dict(model, state_dict=named, save_embedding_layers=False)
    rounded = {name: value.to(torch.bfloat16).contiguous() for name, value in state.items()}
    safetensors.torch.save_file(rounded, folder / _ADAPTER_FILE, metadata={"format": "pt"})
    settings = model.peft_config["default"]
    settings.base_model_name_or_path = trainable.base_name
    settings.inference_mode = True
    settings.save_pretrained(str(folder))


def _write_weights(folder: Path, trainable: TrainableModel, weights: Mapping[str, Tensor]) -> None:
    dtype = torch.bfloat16 if trainable.bf16 else torch.float32
    state = {name.removeprefix(_PREFIX): value.to(dtype) for name, value in weights.items()}
    trainable.causal_lm.config.dtype = dtype
    save_model(trainable.causal_lm, folder, state)
    save_tokenizer(trainable.tokenizer, folder)
