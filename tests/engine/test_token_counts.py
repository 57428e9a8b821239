"""TokenCounts counts what a recount of the whole text would."""

import time
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from cllm_core.engine.token_counts import TokenCounts

TOKENS = st.lists(st.integers(0, 5), max_size=8)


@given(TOKENS, st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=6))
def test_each_position_counts_the_accepted_text_and_the_draft_before_it(
    prompt: list[int], steps: list[tuple[list[int], list[int]]]
) -> None:
    """Drafts of earlier windows, rejected or not, leave no trace."""
    counts, output = TokenCounts(prompt), list[int]()
    for accepted, draft in steps:
        counts.add(accepted)
        output += accepted
        window = counts.of_window(draft)
        assert len(set(window.token_ids.tolist())) == len(window.token_ids)
        assert window.output.shape == window.text.shape == (len(draft) + 1, len(window.token_ids))
        for position in range(len(draft) + 1):
            expected = Counter(output + draft[:position])
            found = dict(zip(window.token_ids.tolist(), window.output[position].tolist(), strict=True))
            assert {token: count for token, count in found.items() if count} == expected
            seen = zip(window.token_ids.tolist(), window.text[position].tolist(), strict=True)
            assert {token for token, count in seen if count} == set(prompt) | set(expected)


def test_a_step_costs_what_a_text_has_of_different_tokens_however_long_it_is() -> None:
    """A recount of 32,000 tokens at 16 positions took 17 ms."""
    counts = TokenCounts([i % 900 for i in range(32_000)])
    counts.add([i % 700 for i in range(4_000)])
    seconds = []
    for _ in range(5):
        started = time.process_time()
        counts.add([3, 5])
        window = counts.of_window(list(range(15)))
        seconds.append(time.process_time() - started)
    assert window.text.shape == (16, 900)
    assert min(seconds) < 0.002
