"""Of a multimodal model, the part that text runs through: the towers for images and sound are left out by name."""

import logging

from torch import nn
from transformers import PreTrainedModel

from cllm_core.errors import ModelLoadError
from cllm_core.models.paged import LayerProbe
from cllm_core.models.probe import run_one_token

logger = logging.getLogger(__name__)


def leave_out_other_parts(model: PreTrainedModel) -> tuple[str, ...]:
    """Drop the modules beside the text decoder that a text never calls, and their memory; returns their names.

    Args:
        model: loaded with attn_implementation="cllm_paged"; changed in place.

    Raises:
        ModelLoadError: the model does not run on text alone.
    """
    num_all = _num_parameters(model)
    unused = tuple(
        name for name in _uncalled(model, _parts_beside(model, model.get_decoder())) if _runs_without(model, name)
    )
    share = 1 - _num_parameters(model) / num_all
    logger.info(
        "%s serves text alone: left out %s (%.0f%% of the parameters)",
        type(model).__name__,
        ", ".join(unused) or "nothing",
        100 * share,
    )
    return unused


def _parts_beside(model: PreTrainedModel, decoder: nn.Module) -> list[str]:
    """Names of the largest modules that neither hold the decoder nor belong to it."""
    kept = (decoder, model.get_input_embeddings(), model.get_output_embeddings())
    found: list[str] = []
    open_modules: list[tuple[str, nn.Module]] = [("", model)]
    while open_modules:
        prefix, module = open_modules.pop()
        for name, child in module.named_children():
            if any(child is part for part in kept):
                continue
            if any(part is decoder for part in child.modules()):
                open_modules.append((f"{prefix}{name}.", child))
            else:
                found.append(prefix + name)
    return found


def _uncalled(model: PreTrainedModel, names: list[str]) -> tuple[str, ...]:
    """Those of the modules with parameters that a text does not call."""
    called: set[str] = set()
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda module, args, name=name: called.add(name))
        for name in names
    ]
    try:
        run_one_token(model, LayerProbe())
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(name for name in names if name not in called and _num_parameters(model.get_submodule(name)))


def _runs_without(model: PreTrainedModel, name: str) -> bool:
    """Drop a module, unless a text then does not run any more: some classes ask a tower for its device."""
    prefix, _, child = name.rpartition(".")
    parent, part = model.get_submodule(prefix), model.get_submodule(name)
    setattr(parent, child, None)
    try:
        run_one_token(model, LayerProbe())
    except ModelLoadError:
        setattr(parent, child, part)
        return False
    return True


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
