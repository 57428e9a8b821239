"""Finds the decoder layers that a FusedLayer can stand in for, proves it, and puts them in place.

FusedLayers know the common shape (Llama, Mistral, Qwen2, Qwen3 and what else has it). Shape alone does not prove that a
layer computes the same - a factor on the residual, interleaved rotary pairs, another kind of norm - so each one has to
reproduce what the layer it replaces made of real inputs, in float32, and is not used where it does not.
"""

import copy
import logging
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from cllm_core.backends.fused_layer import AttentionCall, FusedLayer, HeadShape
from cllm_core.backends.layer_ops import LayerOps, Rope
from cllm_core.backends.step_tables import StepShape, StepTables, TableStep, pack_tables
from cllm_core.models.attention import Scoring, step_attention
from cllm_core.models.paged import KVCache, LayerSpec, RowSpan

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


@dataclass(frozen=True, slots=True)
class Fusion:
    """What came of fusing a model's layers.

    Attributes:
        num_fused: decoder layers that were replaced.
        num_layers: of the model.
        gap: why some were not; None where all were.
    """

    num_fused: int
    num_layers: int
    gap: str | None

    def __str__(self) -> str:
        return f"{self.num_fused} of {self.num_layers} fused"


@dataclass(frozen=True, slots=True)
class LayerProofs:
    """Which decoder layers of a model a FusedLayer can stand in for.

    Attributes:
        calls: of the layers that were proved, by their names in the model.
        num_layers: of the model.
        gaps: of the other layers of the common shape, why not, by name.
    """

    calls: "dict[str, _LayerCall]"
    num_layers: int
    gaps: dict[str, str]

    @property
    def gap(self) -> str | None:
        """Why some layers cannot be fused; None where all can."""
        if self.gaps:
            return ": ".join(next(iter(self.gaps.items())))
        if len(self.calls) < self.num_layers:
            return "some decoder layers have another shape than Llama's"
        return None


def prove_layers(model: PreTrainedModel, ops: LayerOps) -> LayerProofs:
    """Find and prove the layers that can be fused; the model stays as it is.

    Args:
        model: loaded with attn_implementation="cllm_paged".
        ops: that will make the parts of the fused layers.
    """
    num_layers = model.config.get_text_config().num_hidden_layers
    names = [name for name, layer in model.named_modules() if _has_common_shape(layer)]
    calls = _record_calls(model, names) if names else {}
    gaps = {name: "it applies RoPE to part of its heads, or none" for name in names if name not in calls}
    for name in list(calls):
        error = calls[name].relative_error(model.get_submodule(name), ops.in_float32())
        if not error < _MAX_RELATIVE_ERROR:
            gaps[name] = f"its result would differ by {error:.1g}"
            del calls[name]
    for name, gap in gaps.items():
        logger.info("%s of %s is not fused: %s", name, type(model).__name__, gap)
    return LayerProofs(calls, num_layers, gaps)


def fuse_layers(model: PreTrainedModel, ops: LayerOps, proofs: LayerProofs | None = None) -> Fusion:
    """Replace every decoder layer that can be.

    Each layer's plain weights are given up as it is replaced, so that memory for a few copies of one layer is enough.

    Args:
        model: loaded with attn_implementation="cllm_paged".
        ops: make the parts of the fused layers.
        proofs: of the model's layers; None: they are proved here.
    """
    proofs = proofs or prove_layers(model, ops)
    ropes: dict[int, Rope] = {}  # by the factors that transformers passes to the layers
    for name, call in proofs.calls.items():
        key = id(call.position_embeddings[0])
        rope = ropes[key] if key in ropes else ropes.setdefault(key, ops.rope())
        model.set_submodule(name, FusedLayer(model.get_submodule(name), call.attention, rope, ops, name=name))
    return Fusion(len(proofs.calls), proofs.num_layers, proofs.gap)


@dataclass(slots=True)
class _ProbeAttention:
    """Causal attention among the tokens of one row, without a cache; remembers the last call. See PagedAttention."""

    last_call: AttentionCall | None = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        self.last_call = AttentionCall(layer, HeadShape(query.shape[1], key.shape[1], query.shape[2]), scoring)
        return _attend_among(query, key, value, scoring)


def _attend_among(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
    """Causal attention among tokens: [T, H, D], [T, H_kv, D] and [T, H_kv, D_v] to [T, H, D_v].

    Windows, softcaps and sinks are left out: both sides of the comparison hand them on as they are.
    """
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scoring.scale, enable_gqa=True)
    return out[0].transpose(0, 1)


def _attend_stored(query: Tensor, keys: Tensor, values: Tensor, tables: StepTables, scoring: Scoring) -> Tensor:
    """The probe's attention as TableAttention, for a step that is all of its context."""
    slots = tables.write_slots.long()
    return _attend_among(query, keys.flatten(0, 1)[slots], values.flatten(0, 1)[slots], scoring)


def _probe_step(heads: HeadShape, like: Tensor) -> TableStep:
    """A step of the probe's tokens over a cache of one layer, so that storing keys and values is proved too."""
    shape, blocks = StepShape(1, _NUM_PROBE_TOKENS), (2, 0, 1)
    block_size = _NUM_PROBE_TOKENS // len(blocks)
    rows = [RowSpan(0, _NUM_PROBE_TOKENS, 0, blocks)]
    packed = pack_tables(rows, shape, block_size=block_size, scratch_block=len(blocks))
    spec = LayerSpec(heads.num_kv_heads, heads.size, heads.size)
    cache = KVCache([spec], num_blocks=len(blocks) + 1, block_size=block_size, dtype=like.dtype, device=like.device)
    return TableStep(cache, StepTables.view(torch.from_numpy(packed).to(like.device), shape), _attend_stored)


@dataclass(frozen=True, slots=True)
class _LayerCall:
    """One call of a decoder layer: what went in, and what it asked of its attention."""

    hidden_states: Tensor
    kwargs: dict[str, object]
    position_embeddings: tuple[Tensor, Tensor]
    attention: AttentionCall

    def relative_error(self, layer: nn.Module, ops: LayerOps) -> float:
        """How far the layer is from its fused self by these ops, relative to what it adds to its input; in float32."""
        exact = copy.deepcopy(layer).float()
        cos, sin = self.position_embeddings
        kwargs = self.kwargs | {"position_embeddings": (cos.float(), sin.float())}
        before = self.hidden_states.float()
        with torch.inference_mode():
            expected = exact(before, **kwargs | {"paged": _ProbeAttention()})
            fused = FusedLayer(exact, replace(self.attention, layer=0), ops.rope(), ops)
            # A copy, since fused layers overwrite what they are given.
            output = fused(before.clone(), **kwargs | {"paged": _probe_step(self.attention.heads, before)})
        return float((output - expected).norm() / (expected - before).norm())


def _record_calls(model: PreTrainedModel, names: list[str]) -> dict[str, _LayerCall]:
    """Run a few tokens through the model and note the calls of those of these layers that apply RoPE to whole heads."""
    probe = _ProbeAttention()
    # By name: layers as keys would stay alive beside the fused ones.
    calls: dict[str, _LayerCall] = {}

    def record(name: str, _layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], _output: Tensor) -> None:
        assert probe.last_call is not None
        if "paged" not in kwargs:  # which a fused layer needs
            return
        match kwargs.get("position_embeddings"):
            case (Tensor() as cos, Tensor() as sin) if cos.shape[-1] == probe.last_call.heads.size:
                calls[name] = _LayerCall(args[0], kwargs, (cos, sin), probe.last_call)

    hooks = [model.get_submodule(name).register_forward_hook(partial(record, name), with_kwargs=True) for name in names]
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.config.get_text_config().vocab_size
    token_ids = torch.randint(vocab_size, (1, _NUM_PROBE_TOKENS), generator=generator).to(model.device)
    positions = torch.arange(_NUM_PROBE_TOKENS, device=model.device)[None] + _FIRST_PROBE_POSITION
    try:
        with torch.inference_mode(), step_attention(probe):
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
