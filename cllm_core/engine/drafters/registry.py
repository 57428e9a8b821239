"""Sources of drafts by the names that users give (EngineConfig.drafters)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cllm_core.backends.paged_model import PagedModel
from cllm_core.config import EngineConfig
from cllm_core.engine.drafters.base import Drafter
from cllm_core.engine.drafters.copies import KnownText
from cllm_core.engine.drafters.own import OwnPredictions
from cllm_core.engine.drafters.suffix import PastOutputs
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
    "suffix": lambda target, path: PastOutputs(target.config.suffix_memory_mib * _MIB),
}
"""By name, what makes a source for a model; the second argument is what stands behind the colon, or empty."""


def make_drafters(target: Target) -> tuple[Drafter, ...]:
    """The sources that the settings name, in their order."""
    parts = [drafter.partition(":") for drafter in target.config.drafters]
    return tuple(MAKERS[name](target, path) for name, _, path in parts)
