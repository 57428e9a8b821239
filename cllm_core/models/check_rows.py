"""The texts of the self-check, computed in rows of unlike lengths beside one another on the paged cache::

    step 1   first text: a chunk      second text: few tokens     second text again: some tokens
    step 2   first text: the rest     its next token              its next window

A text is random, the same in every check, and named by its tokens alone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from cllm_core.models.forward import TransformersForward
from cllm_core.models.paged import KVCache, PagedStep, RowSpan
from cllm_core.models.probe import probe_layers
from cllm_core.models.ropes import original_context, stated_context

Forward = Callable[[Tensor, Tensor, Sequence[RowSpan], Tensor], Tensor]
"""Token ids [T], positions [T], rows and indices [S] of the tokens that are wanted, to logits [S, V]."""

_NUM_SEQUENCES = 3
_NUM_SCORED = 64  # tokens of a text whose predictions are compared, about: half of them its first
_LEFT_OUT = 4  # one of so many is left out, so that a model that heeds no selection of tokens is found
_MAX_FAR_POSITION = 16_384  # beyond, a row that sees so much would cost more than all else
_SEED = 20


@dataclass(frozen=True, slots=True)
class CheckTexts:
    """Two texts of N tokens.

    Attributes:
        token_ids: [2, N] int64.
        scored: [S] int64, ascending: the tokens whose predictions are compared.
        far_position: of a token beyond the length that the model was first trained for, which joins every step and
            must not change what the others get; None where the model was never stretched.
    """

    token_ids: Tensor
    scored: Tensor
    far_position: int | None

    @classmethod
    def draw(cls, model: PreTrainedModel, num_tokens: int) -> "CheckTexts":
        """For this model, 2 tokens at least, on its device."""
        config = model.config.get_text_config(decoder=True)
        usable = torch.ones(config.vocab_size, dtype=torch.bool)
        usable[[token_id for token_id in _special_ids(model.config) if token_id < len(usable)]] = False
        usable_ids = usable.nonzero()[:, 0]
        generator = torch.Generator().manual_seed(_SEED)
        token_ids = usable_ids[torch.randint(len(usable_ids), (2, num_tokens), generator=generator)]
        first = torch.arange(min(num_tokens, _NUM_SCORED // 2))
        spread = torch.linspace(0, num_tokens - 1, max(2, min(num_tokens - len(first), _NUM_SCORED // 2))).long()
        of_each_row = torch.tensor([row.start for rows in _steps(num_tokens) for row in rows])
        scored = torch.cat((first[first % _LEFT_OUT != 1], spread, of_each_row)).unique()
        return cls(token_ids.to(model.device), scored.to(model.device), _far_position(config))

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.token_ids.shape[1]

    def num_blocks(self, block_size: int) -> int:
        """Cache blocks that the rows need; the last of them is for the far token."""
        return _NUM_SEQUENCES * -(-self.num_tokens // block_size) + 1


@dataclass(frozen=True, slots=True)
class CheckRow:
    """Tokens start to end of a text, with the keys and values of one sequence."""

    kind: str
    text: int
    sequence: int
    start: int
    end: int

    def scored(self, texts: CheckTexts) -> Tensor:
        """[S] bool, which of the scored tokens are in the row."""
        return (texts.scored >= self.start) & (texts.scored < self.end)


def run_rows(forward: Forward, texts: CheckTexts, *, block_size: int) -> Iterator[tuple[CheckRow, Tensor]]:
    """Every row, with the log-probabilities [s, V] after those of its tokens that are scored.

    Args:
        forward: over a cache with `texts.num_blocks` blocks of `block_size` tokens.
        texts: to compute.
        block_size: of the cache.
    """
    far_block = texts.num_blocks(block_size) - 1
    far_pieces = _far_pieces(texts, far_block, block_size)
    for rows in _steps(texts.num_tokens):
        pieces = [
            _Piece(
                texts.token_ids[row.text, row.start : row.end],
                row.start,
                tuple(range(row.sequence, far_block, _NUM_SEQUENCES)),  # apart, as in a cache that has served a while
                texts.scored[row.scored(texts)] - row.start,
            )
            for row in rows
        ]
        yield from zip(rows, _run_step(forward, [*pieces, *far_pieces]), strict=False)


def plain_forward(model: PreTrainedModel, texts: CheckTexts, *, block_size: int, dtype: torch.dtype) -> Forward:
    """The model as transformers wrote it, on a paged cache of plain torch; loaded with "cllm_paged"."""
    cache = KVCache(
        probe_layers(model),
        num_blocks=texts.num_blocks(block_size),
        block_size=block_size,
        dtype=dtype,
        device=model.device,
    )

    call = TransformersForward(model)
    return lambda token_ids, positions, rows, sampled: call(
        token_ids, positions, sampled, PagedStep(cache, rows, model.device)
    )


def log_probabilities(logits: Tensor) -> Tensor:
    """[..., V] logits of any precision to float32."""
    return logits.float().log_softmax(dim=-1)


@dataclass(frozen=True, slots=True)
class _Piece:
    """What a step computes of a sequence: tokens [n], and at which of them, [s], predictions are wanted."""

    token_ids: Tensor
    first_position: int
    block_ids: tuple[int, ...]
    sampled: Tensor


def _steps(num_tokens: int) -> list[list[CheckRow]]:
    chunk, few, some = num_tokens * 3 // 5, max(1, num_tokens // 6), max(1, num_tokens // 4)
    return [
        [
            CheckRow("a prompt's first chunk", text=0, sequence=0, start=0, end=chunk),
            CheckRow("a short prompt", text=1, sequence=1, start=0, end=few),
            CheckRow("a prompt", text=1, sequence=2, start=0, end=some),
        ],
        [
            CheckRow("a prompt's second chunk", text=0, sequence=0, start=chunk, end=num_tokens),
            CheckRow("one token", text=1, sequence=1, start=few, end=few + 1),
            CheckRow("a window", text=1, sequence=2, start=some, end=some + num_tokens // 2),
        ],
    ]


def _special_ids(config: PreTrainedConfig) -> set[int]:
    """Tokens that a config names: those of images want their images, and padding may have no position."""
    named = [*config.to_dict().items(), *config.get_text_config(decoder=True).to_dict().items()]
    ids = {value for name, value in named if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)}
    return {token_id for token_id in ids if token_id >= 0}


def _far_position(config: PreTrainedConfig) -> int | None:
    original, longest = original_context(config), stated_context(config)
    if original is None or longest is None or not original < longest or original > _MAX_FAR_POSITION:
        return None
    return original


def _far_pieces(texts: CheckTexts, far_block: int, block_size: int) -> list[_Piece]:
    """The far token, where there is one. Its own numbers mean nothing: all that it sees is one block."""
    if texts.far_position is None:
        return []
    block_ids = (far_block,) * (texts.far_position // block_size + 1)
    return [_Piece(texts.token_ids[0, :1], texts.far_position, block_ids, texts.scored[:0])]


def _run_step(forward: Forward, pieces: Sequence[_Piece]) -> tuple[Tensor, ...]:
    """Log-probabilities [s, V] of each piece."""
    starts = list(accumulate((len(piece.token_ids) for piece in pieces), initial=0))
    placed = list(zip(starts, pieces, strict=False))
    rows = [RowSpan(start, len(piece.token_ids), piece.first_position, piece.block_ids) for start, piece in placed]
    device = pieces[0].token_ids.device
    positions = [torch.arange(row.first_position, row.context_length, device=device) for row in rows]
    sampled = torch.cat([start + piece.sampled for start, piece in placed])
    logits = forward(torch.cat([piece.token_ids for piece in pieces]), torch.cat(positions), rows, sampled)
    return torch.split(log_probabilities(logits), [len(piece.sampled) for piece in pieces])
