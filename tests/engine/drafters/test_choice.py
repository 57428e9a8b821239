"""Whose draft comes next: the one that would have been confirmed further lately."""

import numpy as np

from cllm_core.engine.drafters.base import Proposal
from cllm_core.engine.drafters.choice import DraftChoice, SharedLengths

OWN, COPIED = [11, 12, 13], [21, 22, 23]
NUM_LEARNT_IN = 4  # drafts that must be enough to change sides


class Request:
    """A text that grows, and the drafts chosen behind it."""

    def __init__(self, *, copied_was_right_in: int = 0, shared: SharedLengths | None = None) -> None:
        self.choice = DraftChoice(shared or SharedLengths(2))
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
        copies = Proposal(np.array(copied), is_trusted) if is_found else None
        source = self.choice.choose(np.array(self.text), [Proposal(np.array(own)), copies])
        return (own, copied)[source]


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


def test_a_new_request_begins_with_the_source_that_was_right_for_those_before_it() -> None:
    shared = SharedLengths(2)
    for _ in range(3):
        Request(copied_was_right_in=3, shared=shared).choose()
    assert Request(shared=shared).choose() == COPIED


def test_any_number_of_sources_is_compared() -> None:
    choice, text = DraftChoice(SharedLengths(3)), [1]
    for _ in range(NUM_LEARNT_IN):
        choice.choose(
            np.array(text), [Proposal(np.array(OWN)), Proposal(np.array(COPIED)), Proposal(np.array([31, 32]))]
        )
        text += [31, 32]
    assert choice.choose(np.array(text), [Proposal(np.array(OWN)), None, Proposal(np.array([41]))]) == 2
    assert choice.is_best(2)
    assert not choice.is_best(0)


def test_drafts_of_a_source_that_are_better_founded_are_judged_apart() -> None:
    shared = SharedLengths(2)
    choice, text = DraftChoice(shared), [1]

    def choose(kind: int) -> int:
        return choice.choose(np.array(text), [Proposal(np.array(OWN)), Proposal(np.array(COPIED), kind=kind)])

    for _ in range(3 * NUM_LEARNT_IN):
        choose(kind=2)
        text += COPIED
        choose(kind=0)
        text += OWN
    assert choose(kind=2) == 1
    assert choose(kind=0) == 0
    assert (
        DraftChoice(shared).choose(np.array(text), [Proposal(np.array(OWN)), Proposal(np.array(COPIED), kind=2)]) == 1
    )
