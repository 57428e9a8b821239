"""Float32 arithmetic with weights of any precision: each module's own are widened while it runs, and no longer.

Rounding to 16 bits hides what the self-check looks for, above all where it sends a token to another expert. A float32
copy of the whole model may not fit the memory; one of a module at a time does.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@contextmanager
def float32_arithmetic(model: PreTrainedModel) -> Iterator[None]:
    """Let `model` compute in float32 inside; its weights are as before afterwards."""
    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, nn.Embedding):  # looks rows up: widening these is enough
                hooks.callback(module.register_forward_hook(_widen_output).remove)
            elif _narrow_tensors(module):
                widened = _Widened()
                hooks.callback(module.register_forward_pre_hook(widened.enter, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(widened.leave, always_call=True).remove)
        yield


def is_quantised(model: PreTrainedModel) -> bool:
    """Whether some weights are kept in less than 16 bits, in a format with an arithmetic of its own."""
    return any(parameter.dtype.itemsize < 2 for parameter in model.parameters()) or getattr(
        model, "is_quantized", False
    )


class _Widened:
    """The narrow tensors of one module, kept aside while float32 copies stand in for them."""

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, Tensor]] = []

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for tensor in _narrow_tensors(module):
            self._kept.append((tensor, tensor.data))
            tensor.data = tensor.data.float()
        return tuple(_widen(arg) for arg in args), {name: _widen(arg) for name, arg in kwargs.items()}

    def leave(self, module: nn.Module, args: object, output: object) -> None:
        while self._kept:
            tensor, data = self._kept.pop()
            tensor.data = data


def _narrow_tensors(module: nn.Module) -> list[Tensor]:
    """The module's own parameters and buffers of 16 bits."""
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return [tensor for tensor in own if tensor.dtype in (torch.bfloat16, torch.float16)]


def _widen_output(module: nn.Module, args: object, output: object) -> object:
    return _widen(output)


def _widen(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
