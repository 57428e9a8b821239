"""Decoder layers of the common shape with fewer, larger operations: what prepacked weights leave of a step on a CPU is
mostly the cost of calling many small ones.

A FusedLayer stands in for one decoder layer of transformers (Llama, Mistral, Qwen2, Qwen3 and what else has their
shape) and is called as it was. Shape alone does not prove that a layer computes the same - a factor on the residual,
interleaved rotary pairs, another kind of norm - so each one has to reproduce what the layer it replaces made of real
inputs, in float32, and is not used where it does not.
"""

import copy
import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from cllm_core.models.adapter_bank import AdaptedProduct, AdapterBank
from cllm_core.models.attention import PagedAttention
from cllm_core.models.native.kernels import Kernels
from cllm_core.models.packed_linear import pack_weight

logger = logging.getLogger(__name__)

# In float32, where rounding changes about 3e-7 of a layer's contribution and anything computed differently far more.
_MAX_RELATIVE_ERROR = 1e-3

# Enough tokens that attention and rotary positions matter; away from 0, where rotation is the identity.
_NUM_PROBE_TOKENS = 12
_FIRST_PROBE_POSITION = 37

_LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


def fuse_layers(model: PreTrainedModel, kernels: Kernels | None = None, adapters: AdapterBank | None = None) -> int:
    """Replace every decoder layer that can be; returns how many were. The replaced layers' plain weights are given up.

    Args:
        model: loaded with attn_implementation="cllm_paged", on the CPU.
        kernels: compute norms and rotary embeddings of a bfloat16 model; None: torch does.
        adapters: whose share the fused products shall add; None: there are none.
    """
    places = [(name, layer) for name, layer in model.named_modules() if _has_common_shape(layer)]
    if not places:
        return 0
    calls = _record_calls(model, [layer for _, layer in places])
    rotation = _Rotation(kernels)
    num_fused = 0
    for name, layer in places:
        call = calls.get(layer)
        if call is None:
            logger.info("%s of %s is not fused: it turns its heads in another way", name, type(model).__name__)
            continue
        error = call.relative_error(layer)
        if not error < _MAX_RELATIVE_ERROR:
            logger.info("%s of %s is not fused: its result would differ by %.1g", name, type(model).__name__, error)
            continue
        model.set_submodule(
            name, FusedLayer(layer, call.attention, rotation, kernels, LayerAdapters.of(adapters, name))
        )
        num_fused += 1
    return num_fused


class FusedLayer(nn.Module):
    """Computes what `layer` does: one product for queries, keys and values; activation, gate and residual sums inside
    the matrix products.

    Args:
        layer: of the common shape.
        call: what it asks of its attention.
        rotation: shared by the layers of a model.
        kernels: compute the norms; None: torch does.
        adapters: of the layer; None: there are none.
    """

    def __init__(
        self,
        layer: nn.Module,
        call: "_AttentionCall",
        rotation: "_Rotation",
        kernels: Kernels | None = None,
        adapters: "LayerAdapters | None" = None,
    ) -> None:
        super().__init__()
        attention = layer.get_submodule("self_attn")
        self._layer, self._scale, self._window = call.layer, call.scale, call.window
        self._num_heads, self._num_kv_heads, self._head_size = call.num_heads, call.num_kv_heads, call.head_size
        self._rotation = rotation
        self._input_norm = _Norm.of(layer.get_submodule("input_layernorm"), kernels)
        self._mlp_norm = _Norm.of(layer.get_submodule("post_attention_layernorm"), kernels)
        has_head_norms = "q_norm" in dict(attention.named_children())
        self._query_norm = _Norm.of(attention.get_submodule("q_norm"), kernels) if has_head_norms else None
        self._key_norm = _Norm.of(attention.get_submodule("k_norm"), kernels) if has_head_norms else None

        def product(part: str, *names: str) -> _Product:
            adapted = None if adapters is None else adapters.product(part, *names)
            return _Product.of(layer.get_submodule(part), *names, adapters=adapted)

        self._qkv = product("self_attn", "q_proj", "k_proj", "v_proj")
        self._out = product("self_attn", "o_proj")
        self._gate, self._up = product("mlp", "gate_proj"), product("mlp", "up_proj")
        self._down = product("mlp", "down_proj")

    def forward(
        self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], paged: PagedAttention, **_: object
    ) -> Tensor:
        """[1, T, H] to the same; the keyword arguments are those of transformers' layers, unused ones ignored."""
        residual = hidden_states[0]
        attended = self._attend(self._input_norm(residual), position_embeddings, paged)
        residual = self._out.plus(attended, residual)
        normed = self._mlp_norm(residual)
        gated = self._up.times(normed, self._gate.silu(normed))
        return self._down.plus(gated, residual)[None]

    def _attend(self, normed: Tensor, position_embeddings: tuple[Tensor, Tensor], paged: PagedAttention) -> Tensor:
        num_heads, num_kv_heads = self._num_heads, self._num_kv_heads
        heads = self._qkv(normed).view(-1, num_heads + 2 * num_kv_heads, self._head_size)
        num_turning = num_heads + num_kv_heads
        turning, value = heads[:, :num_turning], heads[:, num_turning:]
        if self._query_norm is not None and self._key_norm is not None:
            query, key = self._query_norm(turning[:, :num_heads]), self._key_norm(turning[:, num_heads:])
            turning = torch.cat((query, key), dim=1)
        turned = self._rotation(turning, *position_embeddings)
        query, key = turned[:, :num_heads], turned[:, num_heads:]
        out = paged.attend(self._layer, query, key, value, scale=self._scale, window=self._window)
        return out.reshape(normed.shape[0], -1)


class _Rotation:
    """Rotary embedding of queries and keys at once, by the cosines and sines that transformers made for the step."""

    def __init__(self, kernels: Kernels | None = None) -> None:
        self._kernels = kernels
        self._sin: Tensor | None = None
        self._factors: tuple[Tensor, Tensor] | None = None

    def __call__(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[T, H, D] by [1, T, D] each: heads * cos + rotate_half(heads) * sin; `heads` may be overwritten."""
        if self._kernels is not None:
            self._kernels.rotate_(heads, cos, sin)
            return heads
        if self._factors is None or sin is not self._sin:  # once per step: all layers get the same tensors
            minus, plus = sin[0].chunk(2, dim=-1)
            self._factors = cos[0, :, None], torch.cat((-minus, plus), dim=-1)[:, None]
            self._sin = sin
        factor, swapped_factor = self._factors
        first, second = heads.chunk(2, dim=-1)
        return torch.addcmul(heads * factor, torch.cat((second, first), dim=-1), swapped_factor)


@dataclass(frozen=True, slots=True)
class _Norm:
    """Root mean square norm."""

    weight: Tensor
    epsilon: float
    kernels: Kernels | None

    @classmethod
    def of(cls, module: nn.Module, kernels: Kernels | None) -> "_Norm":
        weight, epsilon = module.weight, module.variance_epsilon
        assert isinstance(weight, Tensor)
        assert isinstance(epsilon, float)
        return cls(weight.detach().clone(), epsilon, kernels)

    def __call__(self, x: Tensor) -> Tensor:
        if self.kernels is not None:
            return self.kernels.rms_norm(x, self.weight, self.epsilon)
        return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


@dataclass(frozen=True, slots=True)
class LayerAdapters:
    """What adapters add to the products of one decoder layer.

    Attributes:
        bank: of the model.
        layer: name of the layer in the model.
    """

    bank: AdapterBank
    layer: str

    @classmethod
    def of(cls, bank: AdapterBank | None, layer: str) -> "LayerAdapters | None":
        """None where there is no bank."""
        return None if bank is None else cls(bank, layer)

    def product(self, part: str, *names: str) -> AdaptedProduct:
        """Of these linear layers of a part of the layer, as one."""
        return self.bank.product(*(f"{self.layer}.{part}.{name}" for name in names))


@dataclass(frozen=True, slots=True)
class _Product:
    """x @ weight.T + bias with a packed weight, and what the kernel can do to the result before it writes it.

    Where tokens of the step have adapters, their share comes before everything that is not a sum.
    """

    weight: Tensor
    bias: Tensor | None
    adapters: AdaptedProduct | None = None

    @classmethod
    def of(cls, parent: nn.Module, *names: str, adapters: AdaptedProduct | None = None) -> "_Product":
        """The linear layers of these names as one, outputs side by side."""
        linears = [_linear(parent, name) for name in names]
        weight = torch.cat([linear.weight.detach() for linear in linears])
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        return cls(pack_weight(weight), torch.cat(biases) if biases else None, adapters)

    def __call__(self, x: Tensor) -> Tensor:
        return self._adapted(self._unary(x, "none"), x)

    def silu(self, x: Tensor) -> Tensor:
        """SiLU of the product."""
        if self._is_adapted:
            return F.silu(self(x), inplace=True)
        return self._unary(x, "swish")

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """The product and `other` added."""
        return self._adapted(self._binary(x, other, "add"), x)

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """The product times `other`, element by element."""
        if self._is_adapted:
            return self(x).mul_(other)
        return self._binary(x, other, "mul")

    @property
    def _is_adapted(self) -> bool:
        return self.adapters is not None and self.adapters.is_active

    def _adapted(self, out: Tensor, x: Tensor) -> Tensor:
        if self.adapters is not None and self.adapters.is_active:
            self.adapters.add_to(out, x)
        return out

    def _unary(self, x: Tensor, operation: str) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, operation, [], "")
        return out

    def _binary(self, x: Tensor, other: Tensor, operation: str) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, operation)
        return out


@dataclass(frozen=True, slots=True)
class _AttentionCall:
    """What a layer asked of its attention."""

    layer: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    window: int | None


@dataclass(slots=True)
class _ProbeAttention:
    """Causal attention among the tokens of one row, without a cache; remembers the last call. See PagedAttention."""

    last_call: _AttentionCall | None = None

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        self.last_call = _AttentionCall(layer, query.shape[1], key.shape[1], query.shape[2], scale, window)
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        return out[0].transpose(0, 1)


@dataclass(frozen=True, slots=True)
class _LayerCall:
    """One call of a decoder layer: what went in, and what it asked of its attention."""

    hidden_states: Tensor
    kwargs: dict[str, object]
    position_embeddings: tuple[Tensor, Tensor]
    attention: _AttentionCall

    def relative_error(self, layer: nn.Module) -> float:
        """How far the layer is from its fused self, relative to what it adds to its input; in float32."""
        exact = copy.deepcopy(layer).float()
        cos, sin = self.position_embeddings
        kwargs = self.kwargs | {"position_embeddings": (cos.float(), sin.float()), "paged": _ProbeAttention()}
        before = self.hidden_states.float()
        with torch.inference_mode():
            expected = exact(before, **kwargs)
            output = FusedLayer(exact, self.attention, _Rotation())(before, **kwargs)
        return float((output - expected).norm() / (expected - before).norm())


def _record_calls(model: PreTrainedModel, layers: list[nn.Module]) -> dict[nn.Module, _LayerCall]:
    """Run a few tokens through the model and note the calls of those of these layers whose whole heads are turned."""
    probe = _ProbeAttention()
    calls: dict[nn.Module, _LayerCall] = {}

    def record(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], _: Tensor) -> None:
        assert probe.last_call is not None
        match kwargs.get("position_embeddings"):
            case (Tensor() as cos, Tensor() as sin) if cos.shape[-1] == probe.last_call.head_size:
                calls[layer] = _LayerCall(args[0], kwargs, (cos, sin), probe.last_call)

    hooks = [layer.register_forward_hook(record, with_kwargs=True) for layer in layers]
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.config.get_text_config().vocab_size
    token_ids = torch.randint(vocab_size, (1, _NUM_PROBE_TOKENS), generator=generator)
    positions = torch.arange(_FIRST_PROBE_POSITION, _FIRST_PROBE_POSITION + _NUM_PROBE_TOKENS)[None]
    try:
        with torch.inference_mode():
            model(input_ids=token_ids, position_ids=positions, use_cache=False, paged=probe)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _has_common_shape(layer: nn.Module) -> bool:
    """Whether this is a decoder layer whose parts are those that FusedLayer knows."""
    parts = dict(layer.named_children())
    if set(parts) != _LAYER_PARTS:
        return False
    attention, mlp = dict(parts["self_attn"].named_children()), dict(parts["mlp"].named_children())
    if set(attention) not in (_PROJECTIONS, _PROJECTIONS | _HEAD_NORMS) or set(mlp) != _MLP_PARTS:
        return False
    norms = [module for part in (parts, attention) for name, module in part.items() if name.endswith("norm")]
    linears = [module for part in (attention, mlp) for name, module in part.items() if name.endswith("_proj")]
    return (
        all(type(module) is nn.Linear for module in linears)
        and len({_linear(parts["self_attn"], name).bias is None for name in ("q_proj", "k_proj", "v_proj")}) == 1
        and all(type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon") for module in norms)
        and isinstance(mlp["act_fn"], (nn.SiLU, SiLUActivation))
    )


def _linear(parent: nn.Module, name: str) -> nn.Linear:
    linear = parent.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear
