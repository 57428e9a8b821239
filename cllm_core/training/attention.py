"""Attention of a pack: registered with transformers, like the engine's, and told by keyword which token sees which.

On the CPU every example attends to its own tokens and its shared prefix alone, by plain matrix products: at these sizes
they beat the fused kernel, which has to be given the pack's whole mask (measured: docs/how-to/training.md). On a GPU
one fused call over the whole pack is faster than many small ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from cllm_core.errors import ConfigError
from cllm_core.training.packing import PackLayout, visible

PACK_ATTENTION = "cllm_pack"


@dataclass(frozen=True, slots=True)
class _Span:
    """Tokens that attend to the same keys: queries of the range [begin, end), keys by index."""

    begin: int
    end: int
    keys: Tensor  # [K] int64, token indices


class PackAttention:
    """Attention of one pack, layer by layer. Made for a forward pass and dropped with it."""

    def __init__(self, layout: PackLayout) -> None:
        self._layout = layout
        self._is_fused = _uses_fused_kernel(layout.input_ids.device)
        self._spans = _whole(layout) if self._is_fused else _by_example(layout)
        self._masks: dict[tuple[int | None, torch.dtype], list[Tensor]] = {}

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None, layer: int
    ) -> Tensor:
        """Attend to what each token may see.

        Args:
            query: [H, T, D].
            key: [H_kv, T, D], rotary embedding applied.
            value: [H_kv, T, D_v].
            scale: factor of the dot products.
            window: a token sees itself and the window - 1 positions before it; None sees all before it.
            layer: number of the layer.

        Returns:
            [H, T, D_v].
        """
        attention = _fused_attention if self._is_fused else _plain_attention
        masks = self._masks_for(window, query.dtype)
        outputs = [
            attention(query[:, span.begin : span.end], key[:, span.keys], value[:, span.keys], mask, scale)
            for span, mask in zip(self._spans, masks, strict=True)
        ]
        return torch.cat(outputs, dim=1)

    def _masks_for(self, window: int | None, dtype: torch.dtype) -> list[Tensor]:
        if (window, dtype) not in self._masks:
            self._masks[window, dtype] = [self._mask(span, window, dtype) for span in self._spans]
        return self._masks[window, dtype]

    def _mask(self, span: _Span, window: int | None, dtype: torch.dtype) -> Tensor:
        queries = torch.arange(span.begin, span.end, device=span.keys.device)
        return additive_mask(self._layout, queries, span.keys, window, dtype)


class TextAttention:
    """Attention of the prompts and answers of a pack that keeps every layer's keys and values.

    Args:
        layout: without blocks.

    Attributes:
        cached: (key [H_kv, T, D], value [H_kv, T, D_v]) by layer.
    """

    def __init__(self, layout: PackLayout) -> None:
        self._attention = PackAttention(layout)
        self.cached: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None, layer: int
    ) -> Tensor:
        """See PackAttention."""
        self.cached[layer] = key, value
        return self._attention.attend(query, key, value, scale=scale, window=window, layer=layer)


class BlockAttention:
    """Attention of the blocks of a pack alone, to their text as it was read before, and to themselves.

    Args:
        layout: of the whole pack.
        text: has read its text.
    """

    def __init__(self, layout: PackLayout, text: TextAttention) -> None:
        self._layout, self._text = layout, text
        is_block = torch.zeros_like(layout.input_ids, dtype=torch.bool)
        is_block[layout.row_index[layout.teacher_rows >= 0]] = True
        # Where each token of the pack stands among the keys: those of the text, then those of the blocks.
        num_text = int((~is_block).sum())
        self._places = torch.where(is_block, num_text + is_block.cumsum(0) - 1, (~is_block).cumsum(0) - 1)
        self._spans = [span for span in self._spans_of(layout, is_block) if len(span[0])]
        self._masks: dict[tuple[int | None, torch.dtype], list[Tensor]] = {}

    @staticmethod
    def _spans_of(layout: PackLayout, is_block: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(queries, keys) of each example, as token indices of the pack."""
        spans = _whole(layout) if _uses_fused_kernel(layout.input_ids.device) else _by_example(layout)
        found = []
        for span in spans:
            own = torch.arange(span.begin, span.end, device=is_block.device)
            found.append((own[is_block[own]], span.keys))
        return found

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None, layer: int
    ) -> Tensor:
        """See PackAttention; query, key and value are those of the blocks."""
        text_key, text_value = self._text.cached[layer]
        keys, values = torch.cat([text_key, key], dim=1), torch.cat([text_value, value], dim=1)
        attention = _fused_attention if _uses_fused_kernel(query.device) else _plain_attention
        outputs, first = [], 0
        for (queries, seen), mask in zip(self._spans, self._masks_for(window, query.dtype), strict=True):
            places = self._places[seen]
            end = first + len(queries)
            outputs.append(attention(query[:, first:end], keys[:, places], values[:, places], mask, scale))
            first = end
        return torch.cat(outputs, dim=1)

    def _masks_for(self, window: int | None, dtype: torch.dtype) -> list[Tensor]:
        if (window, dtype) not in self._masks:
            self._masks[window, dtype] = [
                additive_mask(self._layout, queries, keys, window, dtype) for queries, keys in self._spans
            ]
        return self._masks[window, dtype]


def additive_mask(layout: PackLayout, queries: Tensor, keys: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """[Q, K]: 0 where the token of a query sees that of a key, -inf where not."""
    seen = visible(layout, queries, keys)
    if window is not None:
        positions = layout.position_ids
        seen &= positions[queries][:, None] - positions[keys] < window
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def pack_attention(  # noqa: PLR0917 - the signature is transformers'
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
        ConfigError: the architecture uses an attention variant that is not implemented, or does not hand the pack down.
    """
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ConfigError(
                f"{type(module).__name__} uses {name} in its attention: packed training does not support it"
            )
    pack: PackAttention | TextAttention | BlockAttention | None = kwargs.get("pack")
    if pack is None:
        raise ConfigError(
            f"{type(module).__name__} does not hand keyword arguments to its attention function: "
            "packed training does not support it"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: int = module.layer_idx  # type: ignore[assignment]
    out = pack.attend(query[0], key[0], value[0], scale=scale, window=kwargs.get("sliding_window"), layer=layer)
    return out.transpose(0, 1)[None], None


def register_pack_attention() -> None:
    """Make `attn_implementation="cllm_pack"` known to transformers. Idempotent."""
    AttentionInterface.register(PACK_ATTENTION, pack_attention)


def _uses_fused_kernel(device: torch.device) -> bool:
    return device.type != "cpu"


def _plain_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """[H, Q, D_v]; the heads that share keys become one product with more rows."""
    num_kv, num_queries = key.shape[0], query.shape[1]
    shared = query.shape[0] // num_kv
    rows = (query * scale).reshape(num_kv, shared * num_queries, -1)
    scores = (rows @ key.transpose(1, 2)).view(num_kv, shared, num_queries, -1) + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    return (weights.view(num_kv, shared * num_queries, -1) @ value).view(query.shape[0], num_queries, -1)


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    shared = query.shape[0] // key.shape[0]
    # kernels that take a mask want as many heads of keys as of queries
    key, value = key.repeat_interleave(shared, dim=0), value.repeat_interleave(shared, dim=0)
    return functional.scaled_dot_product_attention(query[None], key[None], value[None], mask, scale=scale)[0]


def _whole(layout: PackLayout) -> list[_Span]:
    num_tokens = len(layout.input_ids)
    return [_Span(0, num_tokens, torch.arange(num_tokens, device=layout.input_ids.device))]


def _by_example(layout: PackLayout) -> list[_Span]:
    return [
        _Span(begin, end, torch.cat([torch.arange(prefix_begin, prefix_end), torch.arange(begin, end)]))
        for begin, end, prefix_begin, prefix_end in _ranges(layout.spans)
    ]


def _ranges(spans: Tensor) -> Sequence[list[int]]:
    ranges: list[list[int]] = spans.tolist()
    return ranges
