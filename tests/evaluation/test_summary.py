"""Figures from answers whose figures are known."""

import math

import msgspec
import pytest

from cllm_core.evaluation.summary import best_cell, compare, summarise
from tests.evaluation.factories import make_answer


def test_tokens_per_forward_is_one_for_ar_with_and_without_prefill() -> None:
    (cell,) = summarise([make_answer(num_tokens=7, num_passes=7), make_answer(example="1")], {})
    assert cell.tokens_per_forward == cell.tokens_per_forward_all == 1.0


def test_prefill_passes_and_their_tokens_are_left_out_of_tokens_per_forward() -> None:
    (cell,) = summarise([make_answer(block_length=8, num_tokens=20, num_passes=5, num_prefill_tokens=8)], {})
    assert cell.tokens_per_forward == pytest.approx(12 / 4)
    assert cell.tokens_per_forward_all == pytest.approx(20 / 5)


def test_answers_that_loop_count_for_no_tokens_per_forward_without_loops() -> None:
    varied = make_answer(block_length=8, num_tokens=21, num_passes=11)
    loop = msgspec.structs.replace(make_answer(block_length=8, example="1", num_tokens=80), repetition=0.7)
    (cell,) = summarise([varied, loop], {})
    assert cell.tokens_per_forward_varied == pytest.approx(20 / 10)
    assert cell.tokens_per_forward == pytest.approx((20 + 79) / (10 + 9))
    (cell,) = summarise([loop], {})
    assert cell.tokens_per_forward_varied is None


def test_counts_are_per_block_of_output() -> None:
    (cell,) = summarise([make_answer(block_length=4, num_tokens=20, num_passes=8, num_stationary=5)], {})
    assert cell.fast_forwarded_per_block == pytest.approx(12 * 4 / 20)
    assert cell.stationary_per_block == pytest.approx(5 * 4 / 20)


def test_the_units_of_the_paper_are_means_over_answers_without_runs_of_one_token() -> None:
    short = make_answer(block_length=4, num_tokens=9, num_passes=3, num_stationary=1)
    long = make_answer(block_length=4, example="1", num_tokens=81, num_passes=81, num_stationary=9)
    run = msgspec.structs.replace(make_answer(block_length=4, example="2", num_passes=2), token_ids=(1,) * 10)
    (cell,) = summarise([short, long, run], {})
    assert cell.paper_fast_forwarded == pytest.approx((8 / 2 + 1) / 2)
    assert cell.paper_stationary == pytest.approx((1 * 4 / 9 + 9 * 4 / 81) / 2)
    (cell,) = summarise([run], {})
    assert cell.paper_fast_forwarded is cell.paper_stationary is None
    (cell,) = summarise([msgspec.structs.replace(run, token_ids=(2, *(1,) * 9, 2, 1))], {})
    assert cell.paper_fast_forwarded is not None


def test_speedup_is_the_median_over_examples_of_rates_against_ar() -> None:
    answers = []
    for example, factor in (("a", 2.0), ("b", 3.0), ("c", 9.0)):
        answers += [
            make_answer(example=example, seconds=(9.0, 9.0, 40.0), first_seconds=(1.0, 1.0, 1.0)),
            make_answer(
                example=example,
                block_length=8,
                num_passes=4,
                seconds=(9.0 / factor,) * 3,
                first_seconds=(1.0 / factor,) * 3,
            ),
        ]
    plain, jacobi = summarise(answers, {})
    assert plain.tokens_per_second == pytest.approx(10 / 9)
    assert plain.decode_tokens_per_second == pytest.approx(9 / 8)
    assert plain.speedup == pytest.approx(1.0)
    assert jacobi.speedup == pytest.approx(3.0)
    assert jacobi.decode_speedup == pytest.approx(3.0)


def test_perplexity_is_over_all_tokens_of_the_answers() -> None:
    answers = [make_answer(num_tokens=10), make_answer(example="1", num_tokens=30)]
    (cell,) = summarise(answers, {answers[0].key: 10.0, answers[1].key: 70.0})
    assert cell.perplexity == pytest.approx(math.exp(80 / 40))


def test_the_share_of_answers_equal_to_ar_is_counted() -> None:
    answers = [make_answer(), make_answer(example="1"), make_answer(block_length=8)]
    answers.append(make_answer(block_length=8, example="1", first_token=3))
    assert [cell.same_as_ar for cell in summarise(answers, {})] == [1.0, 0.5]


def test_the_best_block_length_is_the_fastest_above_one() -> None:
    answers = [
        make_answer(block_length=length, num_passes=passes, seconds=(seconds,), first_seconds=(0.1,))
        for length, passes, seconds in ((1, 10, 1.0), (8, 5, 2.0), (16, 4, 3.0))
    ]
    best = best_cell(summarise(answers, {}), "model")
    assert best is not None
    assert best.block_length == 8


def test_the_model_is_compared_at_its_best_with_the_target() -> None:
    right, half = {"execution": 1.0}, {"execution": 0.5}
    answers = [
        make_answer(model="target", scores=right),
        make_answer(model="target", block_length=8, num_passes=8, scores=right),
        make_answer(scores=half, seconds=(4.0,), first_seconds=(1.0,)),
        make_answer(block_length=8, num_passes=4, num_stationary=3, scores=half, seconds=(2.0,), first_seconds=(1.0,)),
    ]
    comparison = compare(summarise(answers, {}), "model", "target")
    assert comparison is not None
    assert comparison.scores == {"execution": -0.5}
    assert comparison.fast_forwarded == pytest.approx(6 / 2)
    assert comparison.stationary is None
    assert comparison.speedup == pytest.approx(2.0)


def test_without_a_target_there_is_no_comparison() -> None:
    assert compare(summarise([make_answer(), make_answer(block_length=8)], {}), "model", "target") is None
