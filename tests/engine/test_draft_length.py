"""Window lengths: what is chosen maximises expected accepted tokens per second, and the estimates follow the engine."""

import itertools
import random

import numpy as np
import pytest

from cllm_core.engine.draft_length import EXPLORE_EVERY, Confirmations, DraftLengths, StepTimes

FLAT = {1: 0.010, 64: 0.010}  # seconds by tokens: a device bound by reading weights
STEEP = {1: 0.010, 64: 0.640}  # a saturated device


def draft_lengths(measured: dict[int, float], max_window: int = 8) -> DraftLengths:
    return DraftLengths(StepTimes(measured, max_tokens=64), max_window)


def teach(lengths: DraftLengths, request_id: str, num_matched: int, *, windows: int = 40) -> None:
    """The same of windows cut to measure and of whole blocks."""
    for is_whole in (True, False):
        for _ in range(windows):
            lengths.observe_window(request_id, 8, num_matched, is_whole=is_whole)


def test_free_tokens_are_all_taken() -> None:
    assert draft_lengths(FLAT).choose({"a": 8, "b": 5}, max_tokens=64) == {"a": 8, "b": 5}


def test_tokens_that_cost_what_a_pass_costs_are_not_drafted() -> None:
    assert draft_lengths(STEEP).choose({"a": 8, "b": 5}, max_tokens=64) == {"a": 1, "b": 1}


def test_budget_goes_to_the_row_whose_drafts_are_confirmed() -> None:
    lengths = draft_lengths(FLAT)
    teach(lengths, "good", num_matched=7)
    teach(lengths, "bad", num_matched=0)
    chosen = lengths.choose({"bad": 8, "good": 8}, max_tokens=9)
    assert chosen == {"bad": 1, "good": 8}


def test_a_load_of_many_rows_shortens_windows() -> None:
    bound_beyond_16_tokens = {1: 0.010, 16: 0.010, 64: 0.040}
    lengths = draft_lengths(bound_beyond_16_tokens)
    alone = lengths.choose({"0": 8}, max_tokens=64)
    crowded = lengths.choose({str(i): 8 for i in range(16)}, max_tokens=64)
    assert alone == {"0": 8}
    assert max(crowded.values()) < 8


@pytest.mark.parametrize("seed", range(5))
def test_choice_reaches_the_best_rate_of_all_choices(seed: int) -> None:
    rng = random.Random(seed)
    measured = {1: 0.010, 4: 0.010 + rng.random() * 0.01, 16: 0.025 + rng.random() * 0.05}
    times = StepTimes(measured, max_tokens=64)
    lengths = DraftLengths(times, max_window=4)
    for request_id in "abc":
        teach(lengths, request_id, num_matched=rng.randrange(4), windows=rng.randrange(1, 12))

    def rate(windows: tuple[int, ...]) -> float:
        chances = (lengths._row_chances(r, 4)[: w - 1].sum() for r, w in zip("abc", windows, strict=True))
        return float(3 + sum(chances)) / times.seconds(sum(windows))

    chosen = lengths.choose(dict.fromkeys("abc", 4), max_tokens=10)
    possible = [w for w in itertools.product(range(1, 5), repeat=3) if sum(w) <= 10]
    assert rate(tuple(chosen.values())) == pytest.approx(max(map(rate, possible)))


def test_depths_that_look_useless_are_tried_again_now_and_then() -> None:
    lengths = draft_lengths({1: 0.010, 64: 0.100})
    chosen = []
    for _ in range(4 * EXPLORE_EVERY):
        window = lengths.choose({"a": 8}, max_tokens=64)["a"]
        lengths.observe_window("a", window, 0, is_whole=window == 8)
        chosen.append(window)
    assert chosen.count(8) >= 3
    assert chosen.count(1) > 2 * EXPLORE_EVERY


def test_short_windows_are_not_taken_for_failures() -> None:
    """Every draft token is confirmed with the same chance, whatever the windows' lengths were when that was learnt."""
    rng = random.Random(1)
    learnt = []
    for window in (3, 8):
        confirmations = Confirmations(np.full(7, 0.8), rate=0.005, num_prior=8)
        for _ in range(4000):
            num_matched = next((depth for depth in range(window - 1) if rng.random() > 0.7), window - 1)
            confirmations.observe(window, num_matched)
        learnt.append(confirmations.chances)
    assert learnt[0][:2] == pytest.approx([0.7, 0.49], abs=0.05)
    assert learnt[1] == pytest.approx(0.7 ** np.arange(1, 8), abs=0.05)
    assert learnt[0][6] >= learnt[1][6] - 0.05


def test_whole_blocks_are_kept_where_cut_ones_accept_less() -> None:
    """As with a CLLM: tokens become right while they wait in a whole block."""
    lengths = draft_lengths({1: 0.010, 8: 0.011, 64: 0.100})
    chosen: list[int] = []
    for _ in range(400):
        window = lengths.choose({"a": 8}, max_tokens=64)["a"]
        settled = chosen[-2:] == [8, 8] and window == 8
        lengths.observe_window("a", window, min(window - 1, 2 if settled else 1), is_whole=window == 8)
        chosen.append(window)
    assert chosen[-100:].count(8) > 90


def test_short_requests_try_for_those_that_come_after_them() -> None:
    """None of them lives long enough to find out alone that drafts have become right."""
    lengths = draft_lengths({1: 0.010, 64: 0.100})
    teach(lengths, "earlier", num_matched=0, windows=300)
    assert lengths.choose({"first": 8}, max_tokens=64) == {"first": 1}
    for request in range(150):
        for _ in range(6):
            window = lengths.choose({str(request): 8}, max_tokens=64)[str(request)]
            lengths.observe_window(str(request), window, window - 1, is_whole=window == 8)
        lengths.forget(str(request))
    assert lengths.choose({"last": 8}, max_tokens=64)["last"] > 1


def test_rows_of_a_step_take_turns_in_trying() -> None:
    lengths = draft_lengths({1: 0.010, 64: 0.100})
    requests = {"a": 8, "b": 8, "c": 8}
    for request in requests:
        teach(lengths, request, num_matched=0, windows=300)
    chosen = [lengths.choose(requests, max_tokens=64) for _ in range(6 * EXPLORE_EVERY)]
    assert [sum(windows[request] == 8 for windows in chosen) for request in requests] == [2, 2, 2]
    assert sum(sum(windows.values()) == 3 for windows in chosen) == 6 * (EXPLORE_EVERY - 1)


def test_a_request_that_ended_is_forgotten() -> None:
    lengths = draft_lengths(FLAT)
    teach(lengths, "a", num_matched=0)
    lengths.forget("a")
    assert lengths._by_request == {}


def test_step_times_follow_what_is_observed() -> None:
    times = StepTimes({1: 0.010, 64: 0.020}, max_tokens=64)
    for _ in range(200):
        times.observe(16, 0.050)
        times.observe(1, 0.012)
    assert times.seconds(16) == pytest.approx(0.050, rel=0.1)
    assert times.seconds(1) == pytest.approx(0.012, rel=0.15)
    assert (times.table()[1:] >= times.table()[:-1]).all()


def test_one_hiccup_changes_little() -> None:
    times = StepTimes({1: 0.010, 64: 0.020}, max_tokens=64)
    before = times.seconds(1)
    times.observe(1, 10.0)
    assert times.seconds(1) < 1.5 * before


def test_forced_tokens_are_drafted_whatever_the_model_accepted_so_far() -> None:
    lengths = draft_lengths({1: 0.010, 64: 0.100})
    teach(lengths, "a", num_matched=0, windows=20)
    assert lengths.choose({"a": 8}, max_tokens=64) == {"a": 1}
    assert lengths.choose({"a": 8}, max_tokens=64, num_forced={"a": 5}) == {"a": 6}
    assert lengths.choose({"a": 4}, max_tokens=64, num_forced={"a": 9}) == {"a": 4}


def test_forced_tokens_teach_nothing_about_guesses() -> None:
    forced, guessed = draft_lengths(FLAT), draft_lengths(FLAT)
    for _ in range(20):
        forced.observe_window("a", 8, 5, num_forced=4)
        forced.observe_window("a", 8, 2, num_forced=4)
        guessed.observe_window("a", 4, 1)
    assert forced.choose({"a": 8}, max_tokens=64) == guessed.choose({"a": 8}, max_tokens=64)
