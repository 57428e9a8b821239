"""Noisy blocks out of Jacobi states."""

import pytest

from cllm_core.training.examples import DraftState, NoisyBlock, global_block, local_block

ANSWER = (10, 11, 12, 13, 14, 15)


def test_block_begins_at_the_first_wrong_token_and_predicts_the_fixed_point() -> None:
    """The picture in the module's docstring."""
    assert global_block(ANSWER, DraftState(2, (12, 99, 98))) == NoisyBlock(3, (99, 98), (14, 15))


def test_tokens_that_would_predict_behind_the_end_are_dropped() -> None:
    block = global_block(ANSWER, DraftState(3, (99, 14, 97, 96, 95)))
    assert block == NoisyBlock(3, (99, 14), (14, 15))


def test_right_tokens_after_a_wrong_one_stay() -> None:
    block = global_block(ANSWER, DraftState(0, (10, 99, 12, 13)))
    assert block == NoisyBlock(1, (99, 12, 13), (12, 13, 14))


@pytest.mark.parametrize(
    "state",
    [
        DraftState(2, (12, 13, 14)),
        DraftState(0, ANSWER),
        DraftState(5, (99, 98)),
        DraftState(6, (1,)),
        DraftState(1, ()),
    ],
)
def test_state_without_a_wrong_token_that_matters_gives_no_block(state: DraftState) -> None:
    assert global_block(ANSWER, state) is None


def test_local_targets_are_the_next_state() -> None:
    """After (1, 90 91 92) one token is accepted, and the next state is (2, 80 81 82)."""
    block = local_block(ANSWER, DraftState(1, (90, 91, 92)), DraftState(2, (80, 81, 82)))
    assert block == NoisyBlock(1, (90, 91, 92), (80, 81, 82))


def test_local_targets_that_the_next_state_accepted_are_final() -> None:
    block = local_block(ANSWER, DraftState(1, (90, 12, 92)), DraftState(3, (80, 81, 82)))
    assert block == NoisyBlock(1, (90, 12, 92), (12, 80, 81))


def test_local_targets_are_predictions_though_the_next_draft_is_a_copy() -> None:
    """Copies were learned as what the model makes of the state."""
    state = DraftState(1, (90, 91, 92), unaccepted_ids=(70, 71, 72))
    assert local_block(ANSWER, state, DraftState(2, (80, 81, 82))) == NoisyBlock(1, (90, 91, 92), (70, 71, 72))
    state = DraftState(1, (90, 12, 92), unaccepted_ids=(71,))
    assert local_block(ANSWER, state, DraftState(4, (80, 81, 82))) == NoisyBlock(1, (90, 12, 92), (12, 13, 71))


def test_local_block_of_the_last_state_is_the_global_one() -> None:
    state = DraftState(2, (99, 98))
    assert local_block(ANSWER, state, None) == global_block(ANSWER, state)
