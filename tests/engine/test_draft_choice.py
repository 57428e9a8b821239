"""Whose draft comes next: the one that would have been confirmed further lately."""

import numpy as np

from cllm_core.engine.draft_choice import DraftChoice
from cllm_core.engine.drafts import Copies

OWN, COPIED = [11, 12, 13], [21, 22, 23]
NUM_LEARNT_IN = 4  # drafts that must be enough to change sides


class Request:
    """A text that grows, and the drafts chosen behind it."""

    def __init__(self, *, copied_was_right_in: int = 0) -> None:
        self.choice = DraftChoice()
        self.text = [1]
        for _ in range(copied_was_right_in):
            self.choose()
            self.text += COPIED

    def choose(
        self,
        *,
        own: list[int] = OWN,
        copied: list[int] = COPIED,
        is_found: bool = True,
        is_trusted: bool = False,
    ) -> list[int]:
        copies = Copies(np.array(copied), is_found, is_trusted)
        draft: list[int] = self.choice.choose(np.array(self.text), np.array(own), copies).tolist()
        return draft


def test_a_request_begins_with_its_own_predictions() -> None:
    assert Request().choose() == OWN


def test_the_source_that_was_right_is_used() -> None:
    assert Request(copied_was_right_in=NUM_LEARNT_IN).choose() == COPIED


def test_sides_are_changed_back_when_copies_fail() -> None:
    request = Request(copied_was_right_in=2)
    for _ in range(3 * NUM_LEARNT_IN):
        request.choose()
        request.text += OWN
    assert request.choose() == OWN


def test_predictions_that_are_not_accepted_teach_nothing() -> None:
    request = Request()
    for _ in range(NUM_LEARNT_IN):
        request.choose()
        request.text += [99]
        request.choose()
        request.text += OWN[:1]
    assert request.choose() == OWN


def test_tokens_accepted_without_a_draft_count_for_the_draft_before_them() -> None:
    request = Request()
    for _ in range(NUM_LEARNT_IN):
        request.choose()
        for token_id in COPIED:  # one a step
            request.text += [token_id]
    assert request.choose() == COPIED


def test_where_nothing_is_found_nothing_is_copied_and_nothing_learnt_of_copies() -> None:
    request = Request(copied_was_right_in=NUM_LEARNT_IN)
    for _ in range(20):
        assert request.choose(is_found=False) == OWN
        request.text += [99]
    assert request.choose() == COPIED


def test_a_trusted_copy_is_used_at_once() -> None:
    assert Request().choose(is_trusted=True) == COPIED


def test_drafts_of_different_length_are_compared_as_far_as_they_go() -> None:
    request = Request()
    request.choose(own=COPIED[:1], copied=COPIED[:1])
    request.text += COPIED
    assert request.choose() == OWN
