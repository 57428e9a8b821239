"""The one attention function under every architecture: registered with transformers, it hands queries, keys and values
to whatever object the caller passed as `paged`, which knows the paged KV cache.

transformers' model classes forward unknown keyword arguments down to the attention function; that is how `paged` gets
here without any state on the module. For the few that do not (StableLM, Nemotron), `step_attention` keeps it in the
context of the call.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from cllm_core.errors import ModelLoadError
from cllm_core.models.checkpoint import quiet

PAGED_ATTENTION = "cllm_paged"

SOFTCAP, SINKS, ALIBI = "logit softcap", "attention sinks", "ALiBi"
"""Features of a layer's scores, see Scoring."""


@dataclass(frozen=True, slots=True)
class Scoring:
    """How a layer makes weights of the dot products of queries and keys.

    Attributes:
        scale: factor of the dot products.
        window: a token sees itself and the window - 1 tokens before it; None sees all before it.
        softcap: scores s become softcap * tanh(s / softcap) (Gemma 2, arXiv:2408.00118); None leaves them.
        sinks: [H], for each head a score that takes part in the softmax and brings no value (gpt-oss); None: none.
        slopes: [H] float32, what each head adds to its scores for every token that a key is nearer (ALiBi,
            arXiv:2108.12409); None: nothing.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    slopes: Tensor | None = None

    @property
    def features(self) -> tuple[str, ...]:
        """Names of what goes beyond scale and window, which not every kernel has."""
        wanted = {SOFTCAP: self.softcap, SINKS: self.sinks, ALIBI: self.slopes}
        return tuple(name for name, value in wanted.items() if value is not None)


class PagedAttention(Protocol):
    """Attention of one step, layer by layer."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Store the keys and values of the step's tokens and attend to each row's whole context.

        Args:
            layer: index of the attention layer.
            query: [T, H, D] of the step's tokens, flattened over rows.
            key: [T, H_kv, D], rotary embedding applied.
            value: [T, H_kv, D_v].
            scoring: of the layer.

        Returns:
            [T, H, D_v].
        """
        ...


_STEP: ContextVar[PagedAttention | None] = ContextVar("cllm_step", default=None)


@contextmanager
def step_attention(paged: PagedAttention) -> Iterator[None]:
    """Let calls of the model inside attend by this step, also where its layers do not hand `paged` down."""
    token = _STEP.set(paged)
    try:
        yield
    finally:
        _STEP.reset(token)


def current_step() -> PagedAttention | None:
    """The step that the model is called for; None outside of one."""
    return _STEP.get()


def paged_attention(  # noqa: PLR0917 - the signature is transformers'
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention for transformers' AttentionInterface; query, key and value are [1, H, T, D].

    Raises:
        ModelLoadError: the architecture uses an attention variant that the paged cache does not implement. Seen when
            the model is probed at load, before any request.
    """
    paged: PagedAttention | None = kwargs.get("paged") or _STEP.get()
    if paged is None:
        raise ModelLoadError(f"{type(module).__name__} was called without a step of the paged cache")
    _require_causal(module, attention_mask, kwargs)
    layer = module.layer_idx
    assert isinstance(layer, int)
    out = paged.attend(
        layer,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        Scoring(
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
            window=kwargs.get("sliding_window"),
            softcap=kwargs.get("softcap"),
            sinks=kwargs.get("s_aux"),
        ),
    )
    # Architectures may view the result in another shape, which strides of all kinds do not allow.
    return out.contiguous()[None], None


def _require_causal(module: nn.Module, attention_mask: Tensor | None, kwargs: Mapping[str, Any]) -> None:
    """Raise ModelLoadError where a token sees others than those before it, or weighs them in a way of its own."""
    name = type(module).__name__
    if kwargs.get("position_bias") is not None:
        raise ModelLoadError(f"{name} adds a bias by position to its scores, which is not supported")
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ModelLoadError(f"{name} attends to later tokens too: it is an encoder, not a decoder")
    if attention_mask is not None:
        raise ModelLoadError(f"{name} brings an attention mask of its own, which is not supported")


@contextmanager
def attention_switched(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Let a model that was loaded with "cllm_paged" attend by another implementation of transformers inside."""
    with quiet():  # transformers warns of parts that it does not find
        model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        with quiet():
            model.set_attn_implementation(PAGED_ATTENTION)


def register_paged_attention() -> None:
    """Make `attn_implementation="cllm_paged"` known to transformers. Idempotent."""
    AttentionInterface.register(PAGED_ATTENTION, paged_attention)
