"""Tokens that an adapter added to the vocabulary of its base: the base grows before the adapter is attached.

PEFT's documentation has its users resize the embeddings by hand; here the adapter's own tensors tell how far.
"""

from collections.abc import Mapping
from pathlib import Path

import peft
import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from cllm_core.errors import ModelLoadError
from cllm_core.models.checkpoint import quiet

Shapes = Mapping[str, tuple[int, ...]]

# What an adapter may hold for an embedding or an output layer, and which dimension counts its tokens.
_TOKEN_DIMENSIONS = {"weight": 0, "base_layer.weight": 0, "lora_B.weight": 0, "lora_embedding_A": 1}
_SAVED_TWICE, _TRAINED_TOKENS = ".modules_to_save.weight", ".token_adapter.trainable_tokens_delta"


def grow_vocabulary(model: PreTrainedModel, folder: Path, config: peft.PeftConfig) -> None:
    """Give embedding and output layer as many rows as the adapter has weights for, in place; no-op where it has fewer.

    Args:
        model: the base.
        folder: of the adapter, whose weights are there.
        config: its settings.

    Raises:
        ModelLoadError: the adapter adds tokens without all of their weights.
    """
    shapes = read_shapes(folder)
    names = _token_layers(model)
    num_rows = max(_rows_of_weights(shapes, names), _rows_of_indices(config))
    if num_rows <= model.config.get_text_config(decoder=True).vocab_size:
        return
    is_tied = model.config.get_text_config(decoder=True).tie_word_embeddings
    lacking = [name for name in (names[:1] if is_tied else names) if not _brings_rows(shapes, name, num_rows)]
    if lacking:
        raise ModelLoadError(
            f"{folder}: the adapter adds tokens to the vocabulary and does not hold their rows of {lacking[0]}; "
            "save it with save_embedding_layers=True where it was trained"
        )
    with quiet():  # transformers advises to train the new rows
        model.resize_token_embeddings(num_rows, mean_resizing=False)


def read_shapes(folder: Path) -> Shapes:
    """Of the adapter's tensors by name; none where the file is damaged, which whoever attaches the adapter tells."""
    path = folder / "adapter_model.safetensors"
    try:
        if path.is_file():
            with safe_open(path, "pt") as file:
                return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no dict
        tensors = torch.load(folder / "adapter_model.bin", map_location="cpu", weights_only=True, mmap=True)
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    except Exception:  # damaged files fail in safetensors, pickle and torch, each with errors of its own
        return {}


def is_redundant(name: str, shapes: Shapes) -> bool:
    """Whether PEFT wrote a tensor twice and reads the other one.

    It does so for a trained embedding that grew, and for the trained tokens of a tied output layer.
    """
    if name.endswith(_SAVED_TWICE):
        return f"{name.removesuffix(_SAVED_TWICE)}.weight" in shapes
    return name.endswith(_TRAINED_TOKENS) and sum(other.endswith(_TRAINED_TOKENS) for other in shapes) > 1


def _token_layers(model: PreTrainedModel) -> list[str]:
    """Names of the embedding and the output layer, in this order."""
    names = {module: name for name, module in model.named_modules()}
    parts = (model.get_input_embeddings(), model.get_output_embeddings())
    return [names[part] for part in parts if part in names]


def _rows_of_weights(shapes: Shapes, names: list[str]) -> int:
    dimensions = {f".{name}.{tensor}": axis for name in names for tensor, axis in _TOKEN_DIMENSIONS.items()}
    rows = [
        shape[axis]
        for tensor, shape in shapes.items()
        for ending, axis in dimensions.items()
        if tensor.endswith(ending)
    ]
    return max(rows, default=0)


def _rows_of_indices(config: peft.PeftConfig) -> int:
    """Enough for the single tokens that were trained."""
    indices = getattr(config, "trainable_token_indices", None) or []
    lists = indices.values() if isinstance(indices, dict) else [indices]
    return max((index + 1 for some in lists for index in some), default=0)


def _brings_rows(shapes: Shapes, name: str, num_rows: int) -> bool:
    """Whether the adapter holds the whole matrix of a layer, by whatever wrapper it is called."""
    return any(
        f".{name}." in tensor and tensor.endswith(".weight") and ".lora_" not in tensor and shape[0] == num_rows
        for tensor, shape in shapes.items()
    )
