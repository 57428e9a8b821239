"""What of a prediction counts as accepted."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.generation.prediction import PredictedText, PredictionAligner

TOKENS = st.lists(st.integers(0, 3), max_size=30)


def aligned(prediction: Sequence[int], *outputs: Sequence[int]) -> tuple[int, int]:
    """Accepted and rejected tokens of an output that comes in these parts."""
    aligner = PredictionAligner(PredictedText(prediction))
    for output in outputs:
        aligner.push(output)
    return aligner.num_accepted, aligner.num_rejected


def of(text: str) -> list[int]:
    return [ord(char) for char in text]


@pytest.mark.parametrize(
    ("prediction", "output", "num_accepted"),
    [
        ("abcdefgh", "abcdefgh", 8),
        ("abcdefgh", "abcXefgh", 7),  # one token replaced
        ("abcdefgh", "abcXYdefgh", 8),  # two inserted
        ("abcdefgh", "abefgh", 6),  # two left out
        ("abcdefgh", "abcdX", 4),  # the end rewritten
        ("abcdefgh", "XYZ", 0),
        ("abcdefgh", "XfgY", 0),  # a run of two is chance
        ("abcdefgh", "fghabc", 3),  # in order only: the place never goes back
        ("aaaa", "aaaaaaaa", 4),  # a predicted token counts once
        ("", "abc", 0),
    ],
)
def test_runs_of_equal_tokens_are_accepted_in_order(prediction: str, output: str, num_accepted: int) -> None:
    assert aligned(of(prediction), of(output)) == (num_accepted, len(prediction) - num_accepted)


@given(TOKENS, TOKENS, st.integers(0, 30))
def test_it_does_not_matter_how_the_output_is_cut_into_steps(
    prediction: list[int], output: list[int], cut: int
) -> None:
    assert aligned(prediction, output[:cut], output[cut:]) == aligned(prediction, output)


@given(TOKENS, TOKENS)
def test_no_more_is_accepted_than_either_text_holds(prediction: list[int], output: list[int]) -> None:
    num_accepted, num_rejected = aligned(prediction, output)
    assert 0 <= num_accepted <= min(len(prediction), len(output))
    assert num_accepted + num_rejected == len(prediction)


@given(TOKENS)
def test_an_output_that_is_the_prediction_is_accepted_whole(text: list[int]) -> None:
    assert aligned(text, text) == (len(text), 0)
