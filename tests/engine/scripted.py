"""A model without weights whose answer is known in advance; fails loudly when the engine mismanages its cache.

Like keys and values of a transformer, what a slot of its cache holds depends on the whole text before the token. A slot
that is stale, foreign or never written makes the model answer CORRUPTED, a token that no scripted text contains.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cllm_core.models.paged import RowSpan

VOCAB_SIZE = 64
EOS, CORRUPTED, FIRST_WORD = 0, 1, 2
PERIOD = 5  # text repeats after this many tokens, until a surprise changes it

_PEAK = 6.0  # logit of the scripted token, others have 0: at temperature 1 it is drawn in 86 % of the cases
_SEED = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


class ScriptedModel:
    """A StepModel; its cache holds (state of the text up to the token, token) per slot."""

    def __init__(self, *, num_blocks: int, block_size: int) -> None:
        self.device = torch.device("cpu")
        self._block_size = block_size
        self._slots: list[tuple[int, int] | None] = [None] * (num_blocks * block_size)

    def forward(self, input_ids: Tensor, positions: Tensor, rows: Sequence[RowSpan], sampled: Tensor) -> Tensor:
        """See PagedModel.forward. Writes the whole step before it reads, as a layer of a transformer does."""
        ids = input_ids.tolist()
        assert positions.tolist() == [row.first_position + i for row in rows for i in range(row.num_tokens)]
        for row in rows:
            self._write(row, ids[row.first_index : row.first_index + row.num_tokens])
        answers = [answer for row in rows for answer in self._read(row)]
        logits = torch.zeros(len(sampled), VOCAB_SIZE)
        chosen = torch.tensor(answers)[sampled]
        return logits.scatter_(1, chosen[:, None], _PEAK)

    def clear_blocks(self, block_ids: Sequence[int]) -> None:
        """See PagedModel.clear_blocks."""
        for block_id in block_ids:
            first = block_id * self._block_size
            self._slots[first : first + self._block_size] = [None] * self._block_size

    def _slot(self, row: RowSpan, position: int) -> int:
        return row.block_ids[position // self._block_size] * self._block_size + position % self._block_size

    def _write(self, row: RowSpan, token_ids: list[int]) -> None:
        before = self._slots[self._slot(row, row.first_position - 1)] if row.first_position else (_SEED, EOS)
        state = before[0] if before is not None else 0
        for position, token_id in enumerate(token_ids, start=row.first_position):
            state = _advance(state, token_id)
            self._slots[self._slot(row, position)] = (state, token_id)

    def _read(self, row: RowSpan) -> list[int]:
        """The answer after each of the row's new tokens, from everything its block ids lead to."""
        state, text, is_sound = _SEED, [], True
        answers = []
        for position in range(row.context_length):
            held_state, token_id = self._slots[self._slot(row, position)] or (0, CORRUPTED)
            state = _advance(state, token_id)
            text.append(token_id)
            is_sound = is_sound and held_state == state
            if position >= row.first_position:
                answers.append(_next_token(state, text) if is_sound else CORRUPTED)
        return answers


def scripted_ar(prompt_ids: Sequence[int], num_tokens: int) -> list[int]:
    """What the scripted model says after a prompt: the plain loop, up to the end of sequence or num_tokens."""
    text = list(prompt_ids)
    state = _SEED
    for token_id in prompt_ids:
        state = _advance(state, token_id)
    while len(text) < len(prompt_ids) + num_tokens:
        text.append(_next_token(state, text))
        state = _advance(state, text[-1])
        if text[-1] == EOS:
            break
    return text[len(prompt_ids) :]


def _advance(state: int, token_id: int) -> int:
    mixed = (state + token_id + 1) * 6364136223846793005 & _MASK  # the multiplier of Knuth's MMIX generator
    return mixed ^ mixed >> 29


def _next_token(state: int, text: Sequence[int]) -> int:
    luck = state >> 40
    if luck % 128 == 0:
        return EOS
    if luck % 16 == 1 or len(text) < PERIOD:
        return FIRST_WORD + (luck >> 7) % (VOCAB_SIZE - FIRST_WORD)
    return text[-PERIOD]
