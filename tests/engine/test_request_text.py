"""Where tokens lie: accepted ones, unconfirmed predictions, guesses."""

from collections.abc import Sequence

import pytest

from cllm_core.config import EngineConfig
from cllm_core.engine.drafters.drafting import Drafting
from cllm_core.engine.plan import Admission
from cllm_core.engine.request_text import RequestText
from tests.engine.factories import make_request, text_drafters

MAX_MODEL_LEN = 32


class DraftedText(RequestText):
    """A text with the sources of its drafts."""

    def __init__(self, admission: Admission) -> None:
        super().__init__(admission, max_model_len=MAX_MODEL_LEN)
        self._drafting = Drafting(text_drafters(EngineConfig()))
        self._drafting.begin(admission.slot, self)

    def make_draft(self, text_end: int, num_tokens: int) -> None:
        self._drafting.write([(self.admission.slot, self, text_end, num_tokens)])


def make_text(
    prompt_ids: Sequence[int],
    *,
    output_ids: Sequence[int] = (),
    block_length: int = 4,
    prediction_ids: Sequence[int] = (),
) -> DraftedText:
    admission = Admission(
        slot=0,
        request=make_request("a", prompt_ids, prediction_ids=prediction_ids),
        seed=0,
        token_ids=(*prompt_ids, *output_ids),
        block_length=block_length,
        stop_token_ids=(),
    )
    return DraftedText(admission)


def draft(text: DraftedText, text_end: int, num_tokens: int) -> list[int]:
    text.make_draft(text_end, num_tokens)
    tokens: list[int] = text.tokens(text_end, text_end + num_tokens).tolist()
    return tokens


def test_an_admitted_text_is_followed_by_a_draft_of_prompt_tokens() -> None:
    text = make_text([11, 12, 13])
    assert text.tokens(0, 3).tolist() == [11, 12, 13]
    assert set(draft(text, 3, 3)) <= {11, 12, 13}


def test_a_text_admitted_again_goes_on_behind_its_output() -> None:
    text = make_text([21], output_ids=[22])
    assert text.tokens(0, 2).tolist() == [21, 22]
    assert set(draft(text, 2, 3)) == {21}


@pytest.mark.parametrize("num_matched", [0, 1, 3])
def test_predictions_lie_where_the_picture_says(num_matched: int) -> None:
    text = make_text([11, 12, 13])
    text.write_draft(3, [31, 32, 33, 34])
    text_end = 4 + num_matched
    tail = draft(text, text_end, 3)[3 - num_matched :]
    assert text.tokens(0, 7).tolist() == [11, 12, 13, 31, 32, 33, 34]
    assert set(tail) <= {11, 12, 13, 31, 32, 33, 34}


def test_what_was_predicted_beyond_a_shorter_window_is_kept_and_extended() -> None:
    text = make_text([11, 12, 13])
    text.write_draft(3, [31, 32, 33, 34])
    text.write_draft(4, [42])
    assert draft(text, 5, 3)[:2] == [33, 34]


def test_a_text_that_repeats_its_prompt_is_drafted_from_it_once_predictions_were_wrong() -> None:
    """Plain models predict nonsense behind a rejected token; it used to head every draft and hid the prompt's words."""
    prompt = [11, 12, 13, 14, 15, 16, 17, 18, 19]
    text = make_text(prompt)
    for end, right in enumerate(prompt[:5], start=len(prompt)):
        text.make_draft(end, 3)
        text.write_draft(end, [right, 77, 77, 77])
    assert draft(text, len(prompt) + 5, 3) == prompt[5:8]


def test_a_prediction_opens_the_draft_of_a_fresh_request() -> None:
    assert draft(make_text([11, 12], prediction_ids=[21, 22, 23, 24, 25]), 2, 3) == [21, 22, 23]


def test_a_prediction_is_gone_on_with_behind_a_shorter_window() -> None:
    text = make_text([11, 12, 13], block_length=6, prediction_ids=[1, 2, 3, 4, 5, 6, 7, 8])
    text.make_draft(3, 1)
    text.write_draft(3, [1, 2])
    assert draft(text, 5, 5) == [3, 4, 5, 6, 7]


def test_a_prediction_is_taken_up_after_what_is_already_said() -> None:
    text = make_text([11, 12], output_ids=[21, 22], prediction_ids=[21, 22, 23, 24, 25])
    assert draft(text, 4, 3) == [23, 24, 25]


def test_a_full_context_leaves_room_for_the_longest_draft() -> None:
    text = make_text([11] * (MAX_MODEL_LEN - 1), block_length=256)
    assert draft(text, MAX_MODEL_LEN - 1, 255) == [11] * 255
    text.write_draft(MAX_MODEL_LEN - 1, [31] * 256)
    assert text.tokens(MAX_MODEL_LEN - 1, MAX_MODEL_LEN).tolist() == [31]
