"""Architectures that compute attention in their own code, taught to ask the paged cache's step.

A module here holds a subclass of transformers' attention module. Inside of a step it hands queries, keys and values to
the step; outside it does what transformers wrote, which the self-check compares it with. transformers' modules are
imported when such a model is loaded, not before.
"""

import importlib

from transformers import PreTrainedModel

# By the class of a model: the module here, and the classes in it and in transformers.
_PAGED = {
    "BloomForCausalLM": ("bloom", "PagedBloomAttention", "BloomAttention"),
    "FalconForCausalLM": ("falcon", "PagedFalconAttention", "FalconAttention"),
    "MptForCausalLM": ("mpt", "PagedMptAttention", "MptAttention"),
}


def has_own_attention(model_class: type[PreTrainedModel]) -> bool:
    """Whether models of this class are taught here."""
    return model_class.__name__ in _PAGED


def teach_paging(model: PreTrainedModel) -> None:
    """Let the attention modules of such a model ask the step, in place: names and weights stay."""
    module_name, paged_name, own_name = _PAGED[type(model).__name__]
    paged_class = getattr(importlib.import_module(f"{__name__}.{module_name}"), paged_name)
    for module in model.modules():
        if type(module).__name__ == own_name:
            module.__class__ = paged_class
