"""The self-check: what a model computes on the paged cache, against what transformers computes without one.

Two random texts go through transformers' own attention in one piece, and through the paged cache in rows of unlike
lengths beside one another::

    step 1   first text: a chunk      second text: few tokens     second text again: some tokens
    step 2   first text: the rest     its next token              its next window

The log-probabilities after each token must be the same. What an architecture does that the cache does not know - a mask
of its own, a change to its scores, state beside keys and values - makes them differ, and so does what depends on
company.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from cllm_core.errors import ModelLoadError
from cllm_core.models.attention import PAGED_ATTENTION
from cllm_core.models.exact import float32_arithmetic, is_quantised
from cllm_core.models.paged import KVCache, PagedStep, RowSpan
from cllm_core.models.probe import probe_layers
from cllm_core.models.ropes import original_context

NUM_TOKENS = 32
"""Of each text, at load."""

MAX_ERROR = 0.01
"""Nats, in float32: another order of additions changes about 1e-5, another computation 0.05 to 10."""

MAX_QUANTISED_ERROR = 0.5
"""Nats, where weights of less than 16 bits keep an arithmetic of their own."""

_REFERENCE = "eager"  # the one attention of transformers that knows all variants
_BLOCK_SIZE = 16
_NUM_SEQUENCES = 3
_NUM_SCORED = 64  # tokens of a text whose predictions are compared, about: half of them its first
_MAX_FAR_POSITION = 16_384  # beyond, a row that sees so much would cost more than all else
_SEED = 20


@dataclass(frozen=True, slots=True)
class Difference:
    """How far the paged cache is from transformers.

    Attributes:
        nats: largest difference of two log-probabilities; not a number where one of them is not.
        row: which kind of row shows it.
        limit: what rounding explains, in nats.
    """

    nats: float
    row: str
    limit: float

    @property
    def is_rounding(self) -> bool:
        """Whether both compute the same."""
        return self.nats <= self.limit

    def __str__(self) -> str:
        return f"{self.nats:.2g} nats in {self.row}, where rounding explains {self.limit:g}"


def require_equal(model: PreTrainedModel, *, name: str, max_model_len: int) -> None:
    """Raise ModelLoadError unless the model computes on the paged cache what transformers computes without.

    Args:
        model: loaded with attn_implementation="cllm_paged".
        name: of the checkpoint, for the message.
        max_model_len: positions that the model has.
    """
    found = compare_with_transformers(model, num_tokens=min(NUM_TOKENS, max_model_len))
    if not found.is_rounding:
        raise ModelLoadError(
            f"{name}: {type(model).__name__} would be served wrong: its log-probabilities are off from transformers' "
            f"own by {found}; --skip-self-check serves it all the same"
        )


@torch.inference_mode()
def compare_with_transformers(model: PreTrainedModel, *, num_tokens: int) -> Difference:
    """Compute two random texts both ways, in float32 unless the weights are quantised.

    Args:
        model: loaded with attn_implementation="cllm_paged".
        num_tokens: of each text, 2 at least; the model has positions for them.

    Raises:
        ModelLoadError: the model does not run.
    """
    texts = _draw_texts(model, num_tokens)
    is_exact = not is_quantised(model)
    with float32_arithmetic(model) if is_exact else nullcontext():
        expected = _reference_logprobs(model, texts)
        dtype = torch.float32 if is_exact else model.dtype
        found = list(_paged_logprobs(model, texts, dtype))
    distances = [(_distance(logprobs, expected[row.text, row.scored(texts)]), row.kind) for row, logprobs in found]
    nats, kind = max(distances, key=lambda pair: (pair[0] != pair[0], pair[0]))
    return Difference(nats, kind, MAX_ERROR if is_exact else MAX_QUANTISED_ERROR)


@dataclass(frozen=True, slots=True)
class _Texts:
    """Two texts of N tokens, and which of their tokens have their predictions compared."""

    token_ids: Tensor  # [2, N] int64
    scored: Tensor  # [S] int64, ascending


@dataclass(frozen=True, slots=True)
class _Row:
    """Tokens start to end of a text, with the keys and values of one sequence."""

    kind: str
    text: int
    sequence: int
    start: int
    end: int

    def scored(self, texts: _Texts) -> Tensor:
        """[S] bool, which of the scored tokens are in the row."""
        return (texts.scored >= self.start) & (texts.scored < self.end)


@dataclass(frozen=True, slots=True)
class _Piece:
    """What a step computes of a sequence: tokens [n], and at which of them, [s], predictions are wanted."""

    token_ids: Tensor
    first_position: int
    block_ids: tuple[int, ...]
    sampled: Tensor


def _steps(num_tokens: int) -> list[list[_Row]]:
    chunk, few, some = num_tokens * 3 // 5, max(1, num_tokens // 6), max(1, num_tokens // 4)
    return [
        [
            _Row("a prompt's first chunk", text=0, sequence=0, start=0, end=chunk),
            _Row("a short prompt", text=1, sequence=1, start=0, end=few),
            _Row("a prompt", text=1, sequence=2, start=0, end=some),
        ],
        [
            _Row("a prompt's second chunk", text=0, sequence=0, start=chunk, end=num_tokens),
            _Row("one token", text=1, sequence=1, start=few, end=few + 1),
            _Row("a window", text=1, sequence=2, start=some, end=some + num_tokens // 2),
        ],
    ]


def _draw_texts(model: PreTrainedModel, num_tokens: int) -> _Texts:
    config = model.config
    usable = torch.ones(config.get_text_config(decoder=True).vocab_size, dtype=torch.bool)
    usable[[token_id for token_id in _special_ids(config) if token_id < len(usable)]] = False
    usable_ids = usable.nonzero()[:, 0]
    draw = torch.Generator().manual_seed(_SEED)
    token_ids = usable_ids[torch.randint(len(usable_ids), (2, num_tokens), generator=draw)]
    first = torch.arange(min(num_tokens, _NUM_SCORED // 2))
    spread = torch.linspace(0, num_tokens - 1, _NUM_SCORED // 2).long()
    of_each_row = torch.tensor([row.start for rows in _steps(num_tokens) for row in rows])
    scored = torch.cat((first, spread, of_each_row)).unique()
    return _Texts(token_ids.to(model.device), scored.to(model.device))


def _special_ids(config: PreTrainedConfig) -> set[int]:
    """Tokens that a config names: those of images want their images, and padding may have no position."""
    named = [*config.to_dict().items(), *config.get_text_config(decoder=True).to_dict().items()]
    ids = {value for name, value in named if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)}
    return {token_id for token_id in ids if token_id >= 0}


def _reference_logprobs(model: PreTrainedModel, texts: _Texts) -> Tensor:
    """[2, S, V] by transformers alone."""
    model.set_attn_implementation(_REFERENCE)
    try:
        logits = model(input_ids=texts.token_ids, use_cache=False, logits_to_keep=texts.scored).logits
    except Exception as error:  # of the model's own code
        detail = " ".join(str(error).split())
        raise ModelLoadError(
            f"{type(model).__name__} cannot be checked, transformers itself does not run it: {detail}; "
            "--skip-self-check serves it unchecked"
        ) from error
    finally:
        model.set_attn_implementation(PAGED_ATTENTION)
    return _log_softmax(logits)


def _paged_logprobs(model: PreTrainedModel, texts: _Texts, dtype: torch.dtype) -> Iterator[tuple[_Row, Tensor]]:
    """Every row of the check, with the log-probabilities [s, V] after those of its tokens that are scored."""
    num_tokens = texts.token_ids.shape[1]
    scratch_block = _NUM_SEQUENCES * -(-num_tokens // _BLOCK_SIZE)
    layers, device = probe_layers(model), model.device
    cache = KVCache(layers, num_blocks=scratch_block + 1, block_size=_BLOCK_SIZE, dtype=dtype, device=device)
    far_rows = _far_rows(model, texts, scratch_block)
    for rows in _steps(num_tokens):
        pieces = [
            _Piece(
                texts.token_ids[row.text, row.start : row.end],
                row.start,
                tuple(range(row.sequence, scratch_block, _NUM_SEQUENCES)),  # apart, as in a cache that served a while
                texts.scored[row.scored(texts)] - row.start,
            )
            for row in rows
        ]
        yield from zip(rows, _run_step(model, cache, [*pieces, *far_rows]), strict=False)


def _far_rows(model: PreTrainedModel, texts: _Texts, scratch_block: int) -> list[_Piece]:
    """A token beyond the length that the model was first trained for, which must not change what others get.

    Its own numbers mean nothing: all that it sees is one block.
    """
    position = original_context(model.config.get_text_config(decoder=True))
    if position is None or position > _MAX_FAR_POSITION:
        return []
    block_ids = (scratch_block,) * (position // _BLOCK_SIZE + 1)
    return [_Piece(texts.token_ids[0, :1], position, block_ids, texts.scored[:0])]


def _run_step(model: PreTrainedModel, cache: KVCache, pieces: Sequence[_Piece]) -> tuple[Tensor, ...]:
    """Log-probabilities [s, V] of each piece."""
    starts = list(accumulate((len(piece.token_ids) for piece in pieces), initial=0))
    placed = list(zip(starts, pieces, strict=False))
    rows = [RowSpan(start, len(piece.token_ids), piece.first_position, piece.block_ids) for start, piece in placed]
    positions = [torch.arange(row.first_position, row.context_length, device=model.device) for row in rows]
    out = model(
        input_ids=torch.cat([piece.token_ids for piece in pieces])[None],
        position_ids=torch.cat(positions)[None],
        use_cache=False,
        logits_to_keep=torch.cat([start + piece.sampled for start, piece in placed]),
        paged=PagedStep(cache, rows, model.device),
    )
    logits: Tensor = out.logits
    return torch.split(_log_softmax(logits[0]), [len(piece.sampled) for piece in pieces])


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(dim=-1)


def _distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference; equal infinities, of tokens that the model never chooses, are none."""
    return float(torch.where(found == expected, 0.0, (found - expected).abs()).amax())
