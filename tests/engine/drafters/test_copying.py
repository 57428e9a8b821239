"""Drafts copied from known text: the look-up against its definition, and what is preferred to what."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_core.engine.drafters.copying import MAX_NGRAM, Copies, copy_known, find_continuation, scattered_tokens

corpora = st.lists(st.integers(1, 3), max_size=14)
suffixes = st.lists(st.integers(1, 3), min_size=1, max_size=MAX_NGRAM)


def continuation_by_definition(corpus: list[int], suffix: list[int], near: int) -> tuple[int, int]:
    """Start of the copy and length of the match: the longest, of these the nearest, with a token left to copy."""
    for size in range(len(suffix), 0, -1):
        starts = [end for end in range(size, len(corpus)) if corpus[end - size : end] == suffix[-size:]]
        if starts:
            return min(starts, key=lambda start: (abs(start - 1 - near), -start)), size
    return 0, 0


@given(corpora, suffixes, st.integers(0, 20))
def test_the_longest_then_nearest_match_is_found(corpus: list[int], suffix: list[int], near: int) -> None:
    found = find_continuation(np.array(corpus, dtype=np.int64), np.array(suffix), near)
    assert found == continuation_by_definition(corpus, suffix, near)


def copies_of(text: list[int], num_tokens: int, *, num_prompt: int | None = None, hint: tuple[int, ...] = ()) -> Copies:
    return copy_known(
        np.array(text),
        num_prompt=num_prompt or len(text),
        prediction=np.array(hint, dtype=np.int64),
        num_tokens=num_tokens,
    )


def guess(text: list[int], num_tokens: int, *, num_prompt: int | None = None, hint: tuple[int, ...] = ()) -> list[int]:
    tokens: list[int] = copies_of(text, num_tokens, num_prompt=num_prompt, hint=hint).tokens.tolist()
    return tokens


def test_what_followed_the_same_words_before_is_copied() -> None:
    assert guess([1, 2, 3, 4, 5, 1, 2], 3) == [3, 4, 5]


def test_a_text_that_repeats_itself_is_continued_round_and_round() -> None:
    assert guess([7, 1, 2, 3, 1, 2], 8) == [3, 1, 2, 3, 1, 2, 3, 1]


@pytest.mark.parametrize(
    ("text", "hint", "is_found", "is_trusted"),
    [
        ([1, 2, 3], (), False, False),
        ([1, 2, 1], (), True, False),
        ([1, 2, 3, 1, 2, 3], (), True, False),  # long matches in the text are no promise of the client
        ([1, 2], (2, 7), True, False),
        ([1, 2, 3], (1, 2, 3, 7), True, True),
        ([1, 2, 3], (4, 5), False, False),
    ],
)
def test_what_was_found_is_told(text: list[int], hint: tuple[int, ...], is_found: bool, is_trusted: bool) -> None:
    copies = copies_of(text, 2, hint=hint)
    assert (copies.is_found, copies.is_trusted) == (is_found, is_trusted)


def test_the_prediction_of_the_client_wins_where_it_matches_as_long() -> None:
    assert guess([1, 2, 3, 1, 2], 1, hint=(1, 2, 7)) == [7]


def test_the_text_wins_where_it_matches_longer() -> None:
    assert guess([1, 2, 3, 1, 2], 1, hint=(4, 2, 7)) == [3]


def test_a_prediction_is_not_copied_beyond_its_end() -> None:
    assert guess([1, 2], 2, num_prompt=1, hint=(2, 7)) == [7, 1]


@given(st.lists(st.integers(1, 99), min_size=1, max_size=20), st.integers(0, 2000))
def test_random_guesses_are_tokens_of_the_prompt(prompt: list[int], position: int) -> None:
    assert set(scattered_tokens(np.array(prompt), position, 40).tolist()) <= set(prompt)


def test_random_guesses_vary_with_the_position() -> None:
    assert len(set(scattered_tokens(np.arange(1, 33), 100, 32).tolist())) > 8
