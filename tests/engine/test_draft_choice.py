"""Whose draft comes next: the one that would have been confirmed further lately."""

import torch

from cllm_core.engine.draft_choice import DraftChoice

OWN, COPIED = [11, 12, 13], [21, 22, 23]
NUM_LEARNT_IN = 4  # windows that must be enough to change sides


def choose(choice: DraftChoice, *slots: int, is_found: bool = True, is_trusted: bool = False) -> list[list[int]]:
    num_rows = len(slots)
    drafts: list[list[int]] = choice.choose(
        torch.tensor(slots),
        torch.tensor([OWN] * num_rows),
        torch.tensor([COPIED] * num_rows),
        is_found=torch.full((num_rows,), is_found),
        is_trusted=torch.full((num_rows,), is_trusted),
    ).tolist()
    return drafts


def accept(choice: DraftChoice, slot: int, tokens: list[int], num_accepted: int) -> None:
    choice.observe(torch.tensor([slot]), torch.tensor([tokens]), torch.tensor([num_accepted]))


def make_choice(*, copied_was_right_in: int = 0) -> DraftChoice:
    """Of two slots; in the first, copies were right that often."""
    choice = DraftChoice(2, torch.device("cpu"))
    for _ in range(copied_was_right_in):
        choose(choice, 0)
        accept(choice, 0, COPIED, num_accepted=3)
    return choice


def test_a_request_begins_with_its_own_predictions() -> None:
    assert choose(make_choice(), 0, 1) == [OWN, OWN]


def test_the_source_that_was_right_is_used_for_its_request_only() -> None:
    assert choose(make_choice(copied_was_right_in=NUM_LEARNT_IN), 0, 1) == [COPIED, OWN]


def test_sides_are_changed_back_when_copies_fail() -> None:
    choice = make_choice(copied_was_right_in=2)
    for _ in range(3 * NUM_LEARNT_IN):
        choose(choice, 0)
        accept(choice, 0, OWN, num_accepted=3)
    assert choose(choice, 0) == [OWN]


def test_predictions_that_are_not_accepted_teach_nothing() -> None:
    choice = make_choice()
    for _ in range(NUM_LEARNT_IN):
        choose(choice, 0)
        accept(choice, 0, [99, *COPIED[1:]], num_accepted=1)
        choose(choice, 0)
        accept(choice, 0, [OWN[0], *COPIED[1:]], num_accepted=1)
    assert choose(choice, 0) == [OWN]


def test_where_nothing_is_found_nothing_is_copied_and_nothing_learnt_of_copies() -> None:
    choice = make_choice(copied_was_right_in=NUM_LEARNT_IN)
    for _ in range(20):
        assert choose(choice, 0, is_found=False) == [OWN]
        accept(choice, 0, [99, 99, 99], num_accepted=1)
    assert choose(choice, 0) == [COPIED]


def test_a_trusted_copy_is_used_at_once() -> None:
    assert choose(make_choice(), 0, is_trusted=True) == [COPIED]


def test_what_is_left_of_an_older_longer_draft_is_not_compared() -> None:
    choice, slot, found = make_choice(), torch.tensor([0]), torch.tensor([True])
    for own, copied in ((OWN, COPIED), (COPIED[:1], COPIED[:1])):  # of the second, both were right as far
        choice.choose(slot, torch.tensor([own]), torch.tensor([copied]), is_found=found, is_trusted=~found)
    accept(choice, 0, COPIED, num_accepted=3)
    assert choose(choice, 0) == [OWN]


def test_a_slot_given_to_a_new_request_forgets_the_old_one() -> None:
    choice = make_choice(copied_was_right_in=NUM_LEARNT_IN)
    choice.forget(torch.tensor([0]))
    accept(choice, 0, COPIED, num_accepted=3)  # no draft was made for the new one yet
    assert choose(choice, 0) == [OWN]
