"""Where tokens lie: accepted ones, unconfirmed predictions, guesses, and nothing from the scratch column."""

from collections.abc import Sequence

import pytest
import torch

from cllm_core.engine.plan import Admission
from cllm_core.engine.token_buffer import TokenBuffer
from tests.engine.factories import make_request

MAX_MODEL_LEN = 32
POISON = 777  # written by no test, so that reading it shows


def make_buffer(*, num_slots: int = 3) -> TokenBuffer:
    return TokenBuffer(num_slots, MAX_MODEL_LEN, torch.device("cpu"))


def admission(
    slot: int,
    prompt_ids: Sequence[int],
    *,
    output_ids: Sequence[int] = (),
    block_length: int = 4,
    prediction_ids: Sequence[int] = (),
) -> Admission:
    return Admission(
        slot=slot,
        request=make_request(f"request {slot}", prompt_ids, prediction_ids=prediction_ids),
        seed=0,
        token_ids=(*prompt_ids, *output_ids),
        block_length=block_length,
        stop_token_ids=(),
    )


def text(buffer: TokenBuffer, slot: int, start: int, end: int) -> list[int]:
    positions = torch.arange(start, end)
    tokens: list[int] = buffer.gather(torch.full_like(positions, slot), positions).tolist()
    return tokens


def advance(
    buffer: TokenBuffer,
    rows: dict[int, tuple[int, list[int], int]],
    *,
    block_length: int = 4,
    has_prediction: bool = False,
) -> None:
    """rows: slot -> (position of the last accepted token, predictions, confirmed ones); padded as the runner does."""
    width = max(len(predicted) for _, predicted, _ in rows.values())
    lengths = [len(predicted) for _, predicted, _ in rows.values()]
    last_positions = [last for last, _, _ in rows.values()]
    buffer.advance(
        torch.tensor(list(rows)),
        torch.tensor(last_positions),
        torch.tensor(lengths),
        torch.tensor([predicted + [predicted[-1]] * (width - len(predicted)) for _, predicted, _ in rows.values()]),
        torch.tensor([matched for _, _, matched in rows.values()]),
        longest=max(last + length for last, length in zip(last_positions, lengths, strict=True)),
        block_length=block_length,
        has_prediction=has_prediction,
    )


def test_an_admitted_text_is_followed_by_a_draft_of_prompt_tokens() -> None:
    buffer = make_buffer()
    buffer.admit([admission(1, [11, 12, 13])])
    assert text(buffer, 1, 0, 3) == [11, 12, 13]
    assert set(text(buffer, 1, 3, 6)) <= {11, 12, 13}


def test_texts_admitted_together_do_not_mix() -> None:
    buffer = make_buffer()
    buffer.admit([admission(2, [11, 12, 13, 14, 15]), admission(0, [21], output_ids=[22])])
    assert text(buffer, 2, 0, 5) == [11, 12, 13, 14, 15]
    assert text(buffer, 0, 0, 2) == [21, 22]
    assert set(text(buffer, 0, 2, 5)) <= {21, 22}  # what was said so far may be looked up as well


@pytest.mark.parametrize("num_matched", [0, 1, 3])
def test_predictions_lie_where_the_picture_says(num_matched: int) -> None:
    buffer = make_buffer()
    buffer.admit([admission(0, [11, 12, 13])])
    advance(buffer, {0: (2, [31, 32, 33, 34], num_matched)})
    assert text(buffer, 0, 0, 7) == [11, 12, 13, 31, 32, 33, 34]
    assert set(text(buffer, 0, 7, 7 + num_matched)) <= {11, 12, 13, 31, 32, 33, 34}


def test_rows_of_different_length_keep_to_their_own_columns() -> None:
    buffer = make_buffer()
    buffer.admit([admission(slot, [11, 12, 13], block_length=8) for slot in range(3)])
    before = text(buffer, 1, 0, 10)
    advance(buffer, {0: (2, [31, 32, 33, 34], 3), 2: (2, [41], 0)}, block_length=8)
    assert text(buffer, 2, 0, 4) == [11, 12, 13, 41]
    assert text(buffer, 2, 4, 10) == before[4:10]  # its draft stays: the window was shorter than the block
    assert text(buffer, 1, 0, 10) == before


def test_a_text_that_repeats_its_prompt_is_drafted_from_it_once_predictions_were_wrong() -> None:
    """Plain models predict nonsense behind a rejected token; it used to head every draft and hid the prompt's words."""
    buffer = make_buffer()
    prompt = [11, 12, 13, 14, 15, 16, 17, 18, 19]
    buffer.admit([admission(0, prompt)])
    for last in range(len(prompt) - 1, len(prompt) + 4):
        assert 77 not in text(buffer, 0, 0, last + 1)
        advance(buffer, {0: (last, [prompt[last + 1 - len(prompt)], 77, 77, 77], 0)})
    assert text(buffer, 0, len(prompt), len(prompt) + 8) == prompt[:8]


def test_an_old_draft_beyond_a_short_window_is_kept_and_extended() -> None:
    buffer = make_buffer()
    buffer.admit([admission(0, [11, 12, 13], block_length=6, prediction_ids=[1, 2, 3, 4, 5, 6, 7, 8])])
    advance(buffer, {0: (2, [1, 2], 1)}, block_length=6, has_prediction=True)
    assert text(buffer, 0, 3, 10) == [1, 2, 3, 4, 5, 6, 7]


def test_the_scratch_column_and_old_texts_are_never_read() -> None:
    buffer = make_buffer(num_slots=1)
    buffer._tokens.fill_(POISON)
    buffer.admit([admission(0, [11, 12], block_length=5)])
    last = 1
    for matched in (0, 3, 1, 4, 0, 2):
        advance(buffer, {0: (last, [51, 52, 53, 54, 55], matched)}, block_length=5)
        last += matched + 1
        assert POISON not in text(buffer, 0, 0, last + 5)


def test_a_slot_given_to_a_new_request_forgets_the_prediction_of_the_old_one() -> None:
    buffer = make_buffer()
    buffer.admit([admission(0, [11, 12], prediction_ids=[7, 7, 7, 7])])
    buffer.admit([admission(0, [11, 12], block_length=8)])
    assert 7 not in text(buffer, 0, 0, 9)


def test_a_prediction_opens_the_draft_of_a_fresh_request() -> None:
    buffer = make_buffer()
    buffer.admit([admission(0, [11, 12], prediction_ids=[21, 22, 23, 24, 25]), admission(1, [11, 12])])
    assert text(buffer, 0, 2, 5) == [21, 22, 23]
    assert set(text(buffer, 1, 2, 5)) <= {11, 12}


def test_a_prediction_is_taken_up_after_what_is_already_said() -> None:
    buffer = make_buffer()
    buffer.admit([admission(0, [11, 12], output_ids=[21, 22], prediction_ids=[21, 22, 23, 24, 25])])
    assert text(buffer, 0, 4, 7) == [23, 24, 25]


def test_a_full_context_leaves_room_for_the_longest_draft() -> None:
    buffer = make_buffer(num_slots=1)
    buffer.admit([admission(0, [11] * (MAX_MODEL_LEN - 1), block_length=256)])
    advance(buffer, {0: (MAX_MODEL_LEN - 2, [31], 0)}, block_length=256)
    assert text(buffer, 0, MAX_MODEL_LEN - 1, MAX_MODEL_LEN) == [31]
