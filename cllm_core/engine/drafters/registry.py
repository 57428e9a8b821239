"""Sources of drafts by the names that users give (EngineConfig.drafters)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import psutil
import torch

from cllm_core.backends.paged_model import PagedModel
from cllm_core.config import EngineConfig
from cllm_core.engine.drafters.base import Drafter
from cllm_core.engine.drafters.copies import KnownText
from cllm_core.engine.drafters.own import OwnPredictions
from cllm_core.engine.drafters.pool import RejectedPredictions
from cllm_core.engine.drafters.suffix import PastOutputs
from cllm_core.info import DrafterInfo
from cllm_core.models.loader import LoadedModel

_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Target:
    """The model to draft for.

    Attributes:
        config: of the engine.
        loaded: the model as it was loaded.
        model: on its backend.
    """

    config: EngineConfig
    loaded: LoadedModel
    model: PagedModel


MAKERS: Mapping[str, Callable[[Target, str], Drafter]] = {
    "own": lambda target, path: OwnPredictions(),
    "copy": lambda target, path: KnownText(),
    "pool": lambda target, path: RejectedPredictions(),
    "suffix": lambda target, path: PastOutputs(target.config.suffix_memory_mib * _MIB),
}
"""By name, what makes a source for a model; the second argument is what stands behind the colon, or empty."""


@dataclass(frozen=True, slots=True)
class MadeDrafter:
    """A source, and the bytes by which memory grew while it was made."""

    drafter: Drafter
    resident_bytes: int

    @property
    def info(self) -> DrafterInfo:
        """For users."""
        return DrafterInfo(name=self.drafter.name, num_bytes=self.drafter.num_bytes, resident_bytes=self.resident_bytes)


def make_drafters(target: Target) -> tuple[MadeDrafter, ...]:
    """The sources that the settings name, in their order."""
    return tuple(_make(target, *drafter.partition(":")[::2]) for drafter in target.config.drafters)


def _make(target: Target, name: str, path: str) -> MadeDrafter:
    before = _resident_bytes()
    drafter = MAKERS[name](target, path)
    return MadeDrafter(drafter, _resident_bytes() - before)


def _resident_bytes() -> int:
    """Of this process, and allocated on its device."""
    on_device = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    resident: int = psutil.Process().memory_info().rss
    return resident + on_device
