"""Window lengths: what is chosen maximises expected accepted tokens per second, and the estimates follow the engine."""

import itertools
import random

import numpy as np
import pytest

from cllm_core.engine.draft_length import EXPLORE_EVERY, TRY_CAP_EVERY, Caps, Confirmations, DraftLengths
from cllm_core.engine.step_times import StepTimes

FLAT = {1: 0.010, 64: 0.010}  # seconds by tokens: a device bound by reading weights
STEEP = {1: 0.010, 64: 0.640}  # a saturated device


def draft_lengths(measured: dict[int, float], max_window: int = 8) -> DraftLengths:
    return DraftLengths(StepTimes(measured, max_tokens=64), max_window)


def teach(lengths: DraftLengths, request_id: str, num_matched: int, *, windows: int = 40) -> None:
    """The same of windows cut to measure and of windows under every cap."""
    teach_cut(lengths, request_id, num_matched, windows=windows)
    for cap in (2, 4, 8):
        for _ in range(windows):
            lengths.observe_window(request_id, cap, min(num_matched, cap - 1), block_length=8)


def teach_cut(lengths: DraftLengths, request_id: str, num_matched: int, *, windows: int) -> None:
    """Of windows cut to measure alone: lengths that no cap has."""
    for _ in range(windows):
        for length in (3, 7):
            lengths.observe_window(request_id, length, min(num_matched, length - 1), block_length=8)


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
def test_windows_cut_to_measure_reach_the_best_rate_of_all_windows(seed: int) -> None:
    rng = random.Random(seed)
    measured = {1: 0.010, 4: 0.010 + rng.random() * 0.01, 16: 0.025 + rng.random() * 0.05}
    times = StepTimes(measured, max_tokens=64)
    lengths = DraftLengths(times, max_window=8)
    for request_id in "abc":
        teach_cut(lengths, request_id, num_matched=rng.randrange(4), windows=rng.randrange(1, 12))

    chances = lengths._chances_of_depths(dict.fromkeys("abc", 4), {}, None)

    def rate(windows: tuple[int, ...]) -> float:
        accepted = 3 + sum(row[: window - 1].sum() for row, window in zip(chances, windows, strict=True))
        return float(accepted) / times.seconds(sum(windows))

    chosen, expected = lengths._cut_to_measure(dict.fromkeys("abc", 4), 10, {})
    possible = [w for w in itertools.product(range(1, 5), repeat=3) if sum(w) <= 10]
    assert rate(tuple(chosen.values())) == pytest.approx(max(map(rate, possible)))
    assert rate(tuple(chosen.values())) == pytest.approx(expected)


def test_chances_of_depths_end_with_the_window_and_begin_behind_what_is_forced() -> None:
    lengths = draft_lengths({1: 0.010, 64: 0.100})
    chances = lengths._chances_of_depths({"a": 4, "b": 2, "c": 3, "d": 1}, {"a": 2}, explorer=2)
    expected = [[1.0, 1.0, 0.8], [0.8, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    assert chances == pytest.approx(np.array(expected))


def test_depths_that_look_useless_are_tried_again_now_and_then() -> None:
    lengths = draft_lengths({1: 0.010, 64: 0.100})
    chosen = []
    for _ in range(4 * EXPLORE_EVERY):
        window = lengths.choose({"a": 8}, max_tokens=64)["a"]
        lengths.observe_window("a", window, 0, block_length=8)
        chosen.append(window)
    assert chosen.count(8) >= 3
    assert chosen.count(1) > 2 * EXPLORE_EVERY


def test_short_windows_are_not_taken_for_failures() -> None:
    """Every draft token is confirmed with the same chance, whatever the windows' lengths were when that was learnt."""
    rng = random.Random(1)
    learnt = []
    for window in (3, 8):
        confirmations = Confirmations([0.8] * 7, rate=0.005, num_prior=8)
        for _ in range(4000):
            num_matched = next((depth for depth in range(window - 1) if rng.random() > 0.7), window - 1)
            confirmations.observe(window, num_matched)
        learnt.append(np.cumprod(confirmations.given_previous))
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
        lengths.observe_window("a", window, min(window - 1, 2 if settled else 1), block_length=8)
        chosen.append(window)
    assert chosen[-100:].count(8) > 90


def confirmed_while_waiting(window: int, before: list[int]) -> int:
    """Draft tokens that a CLLM confirms: one behind a shorter window, three of four in a long one that stays long."""
    return min(window - 1, 1 if window < 4 or before[-2:] != [window] * 2 else 3)


@pytest.mark.parametrize("num_rows", [1, 8])
def test_caps_are_kept_under_which_windows_accept_more_than_their_depths_alone_tell(num_rows: int) -> None:
    lengths = draft_lengths({1: 0.010, 8: 0.011, 32: 0.016, 64: 0.048})
    rows = dict.fromkeys(map(str, range(num_rows)), 8)
    chosen: list[int] = []
    for _ in range(400):
        windows = lengths.choose(rows, max_tokens=64)
        for row, window in windows.items():
            lengths.observe_window(row, window, confirmed_while_waiting(window, chosen), block_length=8)
        chosen.append(windows["0"])
    assert sum(window >= 4 for window in chosen[-100:]) > 85


def test_a_cap_never_tried_is_no_better_than_those_tried() -> None:
    caps = Caps(max_window=16)
    before = caps.accepted()
    for _ in range(200):
        caps.observe(0, 1)
    assert caps.accepted()[1:] == pytest.approx(1.0, abs=0.2)
    assert (before[1:] > 2).all()


def test_a_longer_cap_is_tried_now_and_then() -> None:
    lengths = draft_lengths(STEEP)
    teach(lengths, "a", num_matched=0, windows=100)
    chosen = [lengths.choose({"b": 1, "a": 8}, max_tokens=64)["a"] for _ in range(TRY_CAP_EVERY + 10)]
    tried = chosen[TRY_CAP_EVERY - 1 :][:5]
    assert tried == [2] * 5
    assert chosen.count(2) == 5


def test_a_choice_that_explores_is_announced() -> None:
    """Each token costs nearly what a step of one costs, so that windows are of one token but for those tried."""
    lengths = draft_lengths({1: 1.2, 64: 64.2})
    num_tried = 0
    for _ in range(3 * TRY_CAP_EVERY):
        explores = lengths.explores_next
        is_tried = max(lengths.choose({"a": 8, "b": 8}, 64).values()) > 1
        assert explores or not is_tried
        num_tried += is_tried
    assert num_tried > 3 * TRY_CAP_EVERY / EXPLORE_EVERY


def test_a_first_window_is_what_the_load_leaves() -> None:
    lengths = draft_lengths({1: 0.010, 16: 0.010, 64: 0.640})
    assert lengths.choose({"new": 8}, max_tokens=64) == {"new": 8}
    chosen = lengths.choose({**dict.fromkeys("abcdefghijklmno", 1), "new": 8}, max_tokens=64)
    assert chosen["new"] == 1


def test_short_requests_try_for_those_that_come_after_them() -> None:
    """None of them lives long enough to find out alone that drafts have become right."""
    lengths = draft_lengths({1: 0.010, 64: 0.100})
    teach(lengths, "earlier", num_matched=0, windows=300)
    assert lengths.choose({"first": 8}, max_tokens=64) == {"first": 1}
    for request in range(150):
        for _ in range(6):
            window = lengths.choose({str(request): 8}, max_tokens=64)[str(request)]
            lengths.observe_window(str(request), window, window - 1, block_length=8)
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
        forced.observe_window("a", 8, 5, block_length=16, num_forced=4)
        forced.observe_window("a", 8, 2, block_length=16, num_forced=4)
        guessed.observe_window("a", 4, 1, block_length=16)
    assert forced.choose({"a": 8}, max_tokens=64) == guessed.choose({"a": 8}, max_tokens=64)
