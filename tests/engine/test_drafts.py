"""Drafts copied from known text: the look-up against its definition, and what is preferred to what."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cllm_core.engine.drafts import MAX_NGRAM, Copies, copy_known, find_continuation, prompt_tokens

corpora = st.lists(st.integers(1, 3), min_size=1, max_size=14)
suffixes = st.lists(st.integers(1, 3), min_size=1, max_size=MAX_NGRAM)


def continuation_by_definition(corpus: list[int], suffix: list[int]) -> tuple[int, int] | None:
    """Start of the copy and length of the match: the longest, of these the latest, with a token left to copy."""
    for size in range(len(suffix), 0, -1):
        for end in range(len(corpus) - 1, size - 1, -1):
            if corpus[end - size : end] == suffix[-size:]:
                return end, size
    return None


@given(corpora, st.integers(0, 14), suffixes)
def test_the_longest_then_latest_match_is_found(corpus: list[int], end: int, suffix: list[int]) -> None:
    end = min(end, len(corpus))
    padded = [-1] * (MAX_NGRAM - len(suffix)) + suffix
    ends = torch.tensor([end])
    start, size = find_continuation(torch.tensor([corpus]), ends, torch.tensor([padded]), near=ends)
    expected = continuation_by_definition(corpus[:end], suffix)
    assert size.item() == (expected[1] if expected else 0)
    assert expected is None or start.item() == expected[0]


def copies_of(
    text: list[int],
    num_tokens: int,
    *,
    num_prompt: int | None = None,
    draft: list[int] | None = None,
    hint: list[int] | None = None,
) -> Copies:
    return copy_known(
        torch.tensor([text + (draft or [])]),
        prompt_lengths=torch.tensor([num_prompt or len(text)]),
        text_ends=torch.tensor([len(text)]),
        predictions=None if hint is None else torch.tensor([[*hint, 0]]),
        prediction_lengths=torch.tensor([len(hint or [])]),
        num_tokens=num_tokens,
    )


def guess(
    text: list[int], num_tokens: int, *, num_prompt: int | None = None, hint: list[int] | None = None
) -> list[int]:
    row: list[int] = copies_of(text, num_tokens, num_prompt=num_prompt, hint=hint).tokens[0].tolist()
    return row


def test_what_followed_the_same_words_before_is_copied() -> None:
    assert guess([1, 2, 3, 4, 5, 1, 2], 3) == [3, 4, 5]


def test_of_equally_long_matches_the_nearest_is_taken() -> None:
    corpus, end, suffix = torch.tensor([[1, 2, 3, 1, 2, 4, 1, 2, 5]]), torch.tensor([9]), torch.tensor([[-1, 1, 2]])
    starts = [find_continuation(corpus, end, suffix, near=torch.tensor([near]))[0].item() for near in (0, 4, 99)]
    assert starts == [2, 5, 8]


def test_a_text_that_repeats_itself_is_continued_round_and_round() -> None:
    assert guess([7, 1, 2, 3, 1, 2], 8) == [3, 1, 2, 3, 1, 2, 3, 1]


def test_tokens_behind_the_text_are_not_copied() -> None:
    copies = copies_of([1, 2, 3], 4, draft=[9, 3, 8, 9])
    assert set(copies.tokens[0].tolist()) <= {1, 2, 3}
    assert not copies.is_found


@pytest.mark.parametrize(
    ("text", "hint", "is_found", "is_trusted"),
    [
        ([1, 2, 3], None, False, False),
        ([1, 2, 1], None, True, False),
        ([1, 2, 3, 1, 2, 3], None, True, False),  # long matches in the text are no promise of the client
        ([1, 2], [2, 7], True, False),
        ([1, 2, 3], [1, 2, 3, 7], True, True),
    ],
)
def test_what_was_found_is_told(text: list[int], hint: list[int] | None, is_found: bool, is_trusted: bool) -> None:
    copies = copies_of(text, 2, hint=hint)
    assert copies.is_found.tolist() == [is_found]
    assert copies.is_trusted.tolist() == [is_trusted]


def test_the_prediction_of_the_client_wins_where_it_matches_as_long() -> None:
    assert guess([1, 2, 3, 1, 2], 1, hint=[1, 2, 7]) == [7]


def test_the_text_wins_where_it_matches_longer() -> None:
    assert guess([1, 2, 3, 1, 2], 1, hint=[4, 2, 7]) == [3]


def test_a_prediction_is_not_copied_beyond_its_end() -> None:
    assert guess([1, 2], 2, num_prompt=1, hint=[2, 7]) == [7, 1]


@given(st.lists(st.integers(1, 99), min_size=1, max_size=20), st.integers(0, 2000))
def test_random_guesses_are_tokens_of_the_prompt(prompt: list[int], position: int) -> None:
    tokens = torch.tensor([prompt + [0] * 5])
    guesses = prompt_tokens(tokens, torch.tensor([len(prompt)]), torch.arange(position, position + 40)[None])
    assert set(guesses.flatten().tolist()) <= set(prompt)


def test_random_guesses_vary_with_the_position() -> None:
    tokens: Tensor = torch.arange(1, 33)[None]
    guesses = prompt_tokens(tokens, torch.tensor([32]), torch.arange(100, 132)[None])
    assert len(set(guesses.flatten().tolist())) > 8
