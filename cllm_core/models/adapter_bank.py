"""Adapters beside the base's weights: every adapted matrix product adds B A x for the tokens whose row has an adapter.

AdapterBank holds the weights of all loaded adapters. Before each step it is told which tokens are whose; where none has
an adapter, a product costs one look at an empty tuple more.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import PreTrainedModel

from cllm_core.models.forward import TransformersForward
from cllm_core.models.lora import LinearShape, LowRank
from cllm_core.models.paged import LayerProbe, RowSpan
from cllm_core.models.transfer import to_device

# Enough tokens that a layer which sees only some of them, as experts do, cannot happen to see all.
_NUM_PROBE_TOKENS = 64


GATED_ADAPTER_ID = -1
"""Of the adapter whose rows propose; adapters that requests name have ids above 0."""


@dataclass(frozen=True, slots=True)
class AdapterGroup:
    """The tokens of one adapter in a step."""

    adapter_id: int
    token_index: Tensor | None  # [K] int64 on the device, into the step's flattened tokens; None: all of them


class StepAdapters:
    """Which of the step's tokens each adapter is for.

    Attributes:
        groups: one per adapter in the step; empty where no row has one.
    """

    def __init__(self) -> None:
        self.groups: tuple[AdapterGroup, ...] = ()

    def begin(self, rows: Sequence[RowSpan], device: torch.device) -> None:
        """Prepare for the forward pass over these rows, in the order of the step's flattened tokens."""
        of_adapter: defaultdict[int, list[RowSpan]] = defaultdict(list)
        for row in rows:
            if row.adapter_id:
                of_adapter[row.adapter_id].append(row)
        self.groups = tuple(
            AdapterGroup(adapter_id, None if len(chosen) == len(rows) else _token_index(chosen, device))
            for adapter_id, chosen in of_adapter.items()
        )


class AdaptedProduct:
    """What the loaded adapters add to one matrix product, be it of one linear layer or of several side by side.

    Args:
        step: tells whose tokens are in the step.
        layers: names and shapes of the linear layers, in the order of their outputs.
    """

    def __init__(self, step: StepAdapters, layers: Mapping[str, LinearShape]) -> None:
        self._step = step
        self._layers = dict(layers)
        self._weights: dict[int, LowRank] = {}  # by adapter id

    @property
    def is_active(self) -> bool:
        """Whether a token of the step has an adapter."""
        return bool(self._step.groups)

    @property
    def groups(self) -> tuple[AdapterGroup, ...]:
        """The tokens of each adapter in the step."""
        return self._step.groups

    def weights(self, adapter_id: int) -> LowRank | None:
        """What an adapter has for these layers side by side; None where it has nothing."""
        return self._weights.get(adapter_id)

    def add_to(self, out: Tensor, x: Tensor) -> None:
        """Add the adapters' share to `out` [T, out], in place, for the inputs `x` [T, in] of all the step's tokens."""
        for group in self._step.groups:
            weights = self._weights.get(group.adapter_id)
            if weights is None:
                continue
            if group.token_index is None:
                out.addmm_(F.linear(x, weights.down), weights.up.t())
            else:
                own = x.index_select(0, group.token_index)
                out.index_add_(0, group.token_index, F.linear(F.linear(own, weights.down), weights.up))

    def load(self, adapter_id: int, layers: Mapping[str, LowRank]) -> int:
        """Take what an adapter has for these layers; returns the bytes it takes."""
        own = {name: layers[name] for name in self._layers if name in layers}
        if not own:
            return 0
        self._weights[adapter_id] = next(iter(own.values())) if len(self._layers) == 1 else self._side_by_side(own)
        return self._weights[adapter_id].num_bytes

    def drop(self, adapter_id: int) -> None:
        """Forget an adapter; no-op where it has nothing here."""
        self._weights.pop(adapter_id, None)

    def num_values(self, rank: int) -> int:
        """Elements of an adapter of this rank on all layers."""
        shapes = list(self._layers.values())
        return len(shapes) * rank * (shapes[0].num_in + sum(shape.num_out for shape in shapes))

    def _side_by_side(self, own: Mapping[str, LowRank]) -> LowRank:
        """One pair for all layers: the A of each below the others, its B where its outputs and its ranks meet."""
        down = torch.cat([weights.down for weights in own.values()])
        up = down.new_zeros(sum(shape.num_out for shape in self._layers.values()), len(down))
        first_out = first_rank = 0
        for name, shape in self._layers.items():
            if (weights := own.get(name)) is not None:
                up[first_out : first_out + shape.num_out, first_rank : first_rank + weights.rank] = weights.up
                first_rank += weights.rank
            first_out += shape.num_out
        return LowRank(down, up)


class AdaptedLinear(nn.Module):
    """A linear layer with what the adapters add to it.

    Args:
        linear: nn.Linear, or what stands in for one.
        product: of this layer alone.
    """

    def __init__(self, linear: nn.Module, product: AdaptedProduct) -> None:
        super().__init__()
        self.linear = linear
        self._product = product

    def forward(self, x: Tensor) -> Tensor:
        """[..., T, in] -> [..., T, out], for all the step's tokens."""
        out: Tensor = self.linear(x)
        if self._product.is_active:
            self._product.add_to(out.view(-1, out.shape[-1]), x.reshape(-1, x.shape[-1]))
        return out


class AdapterBank:
    """The weights of all loaded adapters of one model, spread over its matrix products.

    First whoever replaces linear layers asks for the products of those (`product`), then `attach` wraps the others;
    only then adapters are loaded.

    Args:
        model: loaded with attn_implementation="cllm_paged", its layers still as transformers made them.

    Attributes:
        linears: layers that an adapter may change, by name: all but the output and those that see only some tokens.
        step: to be told of every step.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.linears = _adaptable_linears(model)
        self.step = StepAdapters()
        self._device, self._dtype = model.device, model.dtype
        self._products: list[AdaptedProduct] = []

    def product(self, *names: str) -> AdaptedProduct:
        """What adapters add to the product of these linear layers, whose outputs stand side by side."""
        product = AdaptedProduct(self.step, {name: self.linears[name] for name in names})
        self._products.append(product)
        return product

    def attach(self, model: nn.Module) -> None:
        """Wrap those of the linear layers that are still modules of their own."""
        modules = dict(model.named_modules())
        for name in self.linears:
            if name in modules:
                model.set_submodule(name, AdaptedLinear(modules[name], self.product(name)))

    def cast(self, dtype: torch.dtype) -> None:
        """Hold adapters in this type; none is loaded yet."""
        self._dtype = dtype

    def load(self, adapter_id: int, layers: Mapping[str, LowRank]) -> int:
        """Take an adapter's weights; returns the bytes they take. The id is not 0 and not in use."""
        placed = {name: weights.to(self._device, self._dtype) for name, weights in layers.items()}
        return sum(product.load(adapter_id, placed) for product in self._products)

    def drop(self, adapter_id: int) -> None:
        """Give an adapter's memory back; no row may name it any more."""
        for product in self._products:
            product.drop(adapter_id)

    def max_bytes(self, rank: int) -> int:
        """Memory of an adapter of this rank on every layer, at most."""
        return self._dtype.itemsize * sum(product.num_values(rank) for product in self._products)


def _token_index(rows: Sequence[RowSpan], device: torch.device) -> Tensor:
    ranges = [torch.arange(row.first_index, row.first_index + row.num_tokens) for row in rows]
    return to_device(torch.cat(ranges), device)


@torch.inference_mode()
def _adaptable_linears(model: PreTrainedModel) -> dict[str, LinearShape]:
    """The model's linear layers that see every token of a step, as a run of some tokens through it shows."""
    found: dict[str, LinearShape] = {}
    head = model.get_output_embeddings()
    names = {
        module: name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    }

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.Linear)
        if args and args[0].numel() == _NUM_PROBE_TOKENS * module.in_features:
            found[names[module]] = LinearShape(module.in_features, module.out_features)

    hooks = [module.register_forward_pre_hook(note) for module in names]
    index = torch.arange(_NUM_PROBE_TOKENS, device=model.device)
    try:
        TransformersForward(model)(index % model.config.get_text_config().vocab_size, index, index, LayerProbe())
    finally:
        for hook in hooks:
            hook.remove()
    return found
