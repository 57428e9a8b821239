"""What a training leaves behind: weights, cllm.json, the facts of the run and a model card made of them."""

import platform
from collections.abc import Mapping
from pathlib import Path

import msgspec
import peft
import psutil
import safetensors.torch
import torch
import transformers
from torch import Tensor

from cllm_core.models.cllm_json import FORMAT_VERSION, CllmCard, write_card
from cllm_core.training.trainable import TrainableModel

FACTS_FILE = "training.json"
CARD_FILE = "README.md"
RESULTS_MARK = "<!-- results: `cllm eval` writes them here -->"

_ADAPTER_FILE = "adapter_model.safetensors"
_PREFIX = "causal_lm."  # of parameter names in PackedModel


class TrainingFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What there is to know of a run.

    Attributes:
        title: heading of the card.
        settings: all of the run, as plain data, without paths of this machine.
        data: name or file of the data.
        num_examples, num_left_out: used, and left out because they were too long.
        num_steps: optimiser steps.
        num_tokens: packed tokens trained on, all epochs.
        seconds: wall time of the training, interruptions not counted.
        final_losses: means over the last report.
        machine: device, processor and versions.
    """

    title: str
    base: str
    domain: str | None
    block_length: int | None
    settings: dict[str, object]
    data: str
    num_examples: int
    num_left_out: int
    num_steps: int
    num_tokens: int
    seconds: float
    final_losses: dict[str, float]
    machine: str


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
        CllmCard(format_version=FORMAT_VERSION, block_length=facts.block_length, domain=facts.domain, base=facts.base),
    )
    (folder / FACTS_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(facts)) + b"\n")
    (folder / CARD_FILE).write_text(model_card(facts), encoding="utf-8")


def describe_machine(device: torch.device) -> str:
    """Device, processor and versions, for the record of costs."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count()
    return (
        f"{name}, {cores} CPU cores, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"peft {peft.__version__}"
    )


def model_card(facts: TrainingFacts) -> str:
    """The README.md of the result, in Markdown with the Hub's metadata on top."""
    rows = [
        ("base", facts.base),
        ("domain", facts.domain or "general"),
        ("Jacobi block length", facts.block_length or "none: trained for AR decoding"),
        ("data", facts.data),
        ("examples", f"{facts.num_examples} ({facts.num_left_out} longer ones left out)"),
        ("optimiser steps", facts.num_steps),
        ("packed tokens", facts.num_tokens),
        ("wall time", f"{facts.seconds / 60:.1f} min"),
        ("machine", facts.machine),
        *((name.replace("_", " ") + ", last report", value) for name, value in facts.final_losses.items()),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    recipe = msgspec.json.format(msgspec.json.encode(facts.settings)).decode()
    return (
        f"---\nbase_model: {facts.base}\nlibrary_name: peft\ntags: [consistency-llm, jacobi-decoding]\n---\n\n"
        f"# {facts.title}\n\nTrained with cllm-server. Serve it with `cllm serve FOLDER`.\n\n"
        f"## Training\n\n| | |\n| --- | --- |\n{table}\n\n"
        f"Settings:\n\n```json\n{recipe}\n```\n\n## Results\n\n{RESULTS_MARK}\n"
    )


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
    trainable.causal_lm.save_pretrained(folder, state_dict=state)
    trainable.tokenizer.save_pretrained(folder)
