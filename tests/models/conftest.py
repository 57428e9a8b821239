"""What the tests of loading share: a loader without progress, and what plain transformers computes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cllm_core.config import EngineConfig
from cllm_core.models.loader import LoadedModel, load_model
from tests.checkpoints import VOCAB_SIZE

Load = Callable[..., LoadedModel]


@pytest.fixture
def load() -> Load:
    """See load_silently."""
    return load_silently


def load_silently(model: Path | str | None, **settings: object) -> LoadedModel:
    """Load with the given settings, on the CPU, with an attention that plain transformers has too."""
    name = None if model is None else str(model)
    config = EngineConfig(model=name, **{"device": "cpu", **settings})  # type: ignore[arg-type]
    return load_model(config, lambda stage, fraction: None, attn_implementation="eager")


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    """[1, 24, V] of fixed random tokens."""
    ids = torch.randint(3, VOCAB_SIZE, (1, 24), generator=torch.Generator().manual_seed(7))
    logits: torch.Tensor = model(ids).logits
    return logits


def plain_logits(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What transformers alone computes from the folder."""
    return logits_of(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager"))
