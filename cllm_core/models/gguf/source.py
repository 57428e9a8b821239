"""What the tables of architectures read from: keys, shapes and the few tensors that belong to the configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cllm_core.errors import ModelLoadError
from cllm_core.models.gguf.file import GgufFile
from cllm_core.models.gguf.keys import Keys

ROPE_FREQS = "rope_freqs.weight"
ROPE_FACTORS_LONG = "rope_factors_long.weight"
ROPE_FACTORS_SHORT = "rope_factors_short.weight"
ROPE_TENSORS = (ROPE_FREQS, ROPE_FACTORS_LONG, ROPE_FACTORS_SHORT)


@dataclass(frozen=True, slots=True)
class Source:
    """A model in GGUF's terms, in a file or about to be written to one.

    Attributes:
        path: for messages.
        keys: metadata of its architecture.
        shapes: of all tensors by name, rows first.
        factors: those of ROPE_TENSORS that it has, [rotated dimensions / 2] float32.
    """

    path: Path
    keys: Keys
    shapes: Mapping[str, tuple[int, ...]]
    factors: Mapping[str, Tensor]

    def num_rows(self, name: str) -> int:
        """Rows of a matrix; ModelLoadError where there is none of this name."""
        match self.shapes.get(name):
            case (rows, _):
                return rows
        raise ModelLoadError(f"{self.path}: has no matrix {name}; convert the model again")


def source_of(file: GgufFile, architecture: str) -> Source:
    """What `Architecture.read` takes of a file."""
    return Source(
        path=file.path,
        keys=Keys(file.path, file.values, f"{architecture}."),
        shapes={name: tensor.shape for name, tensor in file.tensors.items()},
        factors={name: file.tensors[name].decode().float() for name in ROPE_TENSORS if name in file.tensors},
    )
