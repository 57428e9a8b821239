"""The seam between loading a model and running it: a Backend prepares a loaded model for a machine and returns a
PagedModel, which allocates a cache and computes steps. `choose` picks the backend.
"""

from typing import Protocol

from transformers import PreTrainedModel

from cllm_core.backends.paged_model import PagedModel
from cllm_core.models.adapter_bank import AdapterBank


class Backend(Protocol):
    """Prepares models for a kind of machine."""

    def prepare(self, model: PreTrainedModel, adapters: AdapterBank | None = None) -> PagedModel:
        """Make a model ready to run; its modules may be replaced, and the plain ones' memory given up.

        Args:
            model: loaded with attn_implementation="cllm_paged", in eval mode, on its device.
            adapters: the bank of the adapters that are served beside it, attached here; none are loaded yet.

        Raises:
            ModelLoadError: the architecture has layers that the paged cache cannot hold.
        """
        ...
