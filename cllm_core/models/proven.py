"""Which models are known to be served right: those that the tests compare with transformers, architecture by rope.

The list lies in proven.json beside this module, which `python -m tests.models_page` writes from a run of the whole
matrix (docs/reference/models.md). All others check themselves at load.
"""

import functools
import importlib.resources

import msgspec
import transformers
from transformers import PreTrainedModel

from cllm_core.models.checkpoint import Checkpoint
from cllm_core.models.ropes import rope_types

FILE_NAME = "proven.json"


class Proven(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was compared and found equal.

    Attributes:
        oldest, newest: releases of transformers that the tests run on, as (major, minor).
        ropes: by the architecture's class, the types of its rotary embedding; "" where it has none.
        gguf: architectures whose GGUF files are compared with their folders or with llama.cpp, as those name them.
    """

    oldest: tuple[int, int]
    newest: tuple[int, int]
    ropes: dict[str, list[str]]
    gguf: list[str]


@functools.cache
def read_proven() -> Proven:
    """The list that this version came with."""
    text = (importlib.resources.files("cllm_core.models") / FILE_NAME).read_bytes()
    return msgspec.json.decode(text, type=Proven)


def find_gap(model: PreTrainedModel, checkpoint: Checkpoint) -> str | None:
    """Why the tests say nothing about a model, None where they compare its architecture, rope and file format."""
    proven, config, name = read_proven(), model.config, type(model).__name__
    if not proven.oldest <= installed_release() <= proven.newest:
        return f"the tests run on transformers {_release(proven.oldest)} to {_release(proven.newest)}"
    if not type(model).__module__.startswith("transformers.models."):
        return f"{name} is code of the checkpoint's own"
    if name not in proven.ropes:
        return f"the tests do not compare {name}"
    ropes = sorted(set(rope_names(model)) - set(proven.ropes[name]))
    if ropes:
        return f"the tests do not compare {name} with a rope of type {', '.join(ropes)}"
    if checkpoint.gguf_file is not None:
        return (
            None if config.model_type in proven.gguf else f"the tests do not compare GGUF files of {config.model_type}"
        )
    return "its weights are quantised" if hasattr(config, "quantization_config") else None


def rope_names(model: PreTrainedModel) -> tuple[str, ...]:
    """Types of the model's rotary embeddings, "" for none, as the list has them."""
    return rope_types(model.config.get_text_config(decoder=True)) or ("",)


def installed_release() -> tuple[int, int]:
    """Of transformers: major and minor."""
    major, minor = transformers.__version__.split(".")[:2]
    return int(major), int(minor)


def _release(release: tuple[int, int]) -> str:
    return ".".join(map(str, release))
