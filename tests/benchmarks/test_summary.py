import pytest

from benchmarks.served.records import BenchmarkError
from benchmarks.served.report import ratios_of
from benchmarks.served.servers import AR, JACOBI, LLAMA, TRANSFORMERS
from benchmarks.served.summary import figures_of, median_figures, median_ratio, require_whole, share_of_same_text
from tests.benchmarks.factories import count_words, make_answer, make_figures, make_measured


def test_throughput_is_over_the_whole_load() -> None:
    answers = [make_answer(started=0.0, finished=10.0), make_answer(started=5.0, first=6.0, last=20.0, finished=20.0)]
    figures = figures_of(answers, count_words)
    assert figures.output_tokens_per_second == 20 / 20
    assert figures.requests_per_second == 2 / 20


def test_latencies_are_those_of_single_requests() -> None:
    figures = figures_of([make_answer(), make_answer(started=1.0, first=4.0)], count_words)
    assert figures.first_token.p50 == pytest.approx(2.0)
    assert figures.first_token.p95 == pytest.approx(2.9)
    assert figures.end_to_end.p50 == pytest.approx(9.5)
    assert figures.inter_token.p50 == pytest.approx((9 / 9 + 6 / 9) / 2)


def test_all_tokens_of_the_first_chunk_were_there_when_it_came() -> None:
    """All but one of them counted as decoded afterwards, so that Jacobi's times per token were too small."""
    jacobi = make_answer(
        text="one two three four five six", first_text="one two three", first=1.0, last=4.0, num_tokens=6
    )
    assert figures_of([jacobi], count_words).inter_token.p50 == pytest.approx(3.0 / 3)


def test_answers_in_one_chunk_have_no_time_per_token() -> None:
    at_once = make_answer(text="one two", first_text="one two", first=1.0, last=1.0, num_tokens=3)
    assert figures_of([at_once, make_answer()], count_words).inter_token.p50 == pytest.approx(9 / 9)
    assert figures_of([at_once], count_words).inter_token.p50 == 0.0


def test_tokens_are_counted_where_the_server_does_not_tell() -> None:
    answers = [
        make_answer(text="one two three", finish_reason="length", num_tokens=None),
        make_answer(text="one two three", finish_reason="stop", num_tokens=None),
        make_answer(num_tokens=10),
    ]
    assert figures_of(answers, count_words).num_tokens == 3 + 4 + 10


def test_tokens_per_forward_need_the_passes_of_every_answer() -> None:
    told = [make_answer(num_forward_passes=5), make_answer(num_forward_passes=3)]
    assert figures_of(told, count_words).tokens_per_forward == 20 / 8
    assert figures_of([*told, make_answer()], count_words).tokens_per_forward is None


def test_an_answer_without_text_counts_with_its_end() -> None:
    figures = figures_of([make_answer(first=None, last=None, text="", first_text="", num_tokens=1)], count_words)
    assert figures.first_token.p50 == 10.0
    assert figures.inter_token.p50 == 0.0


def test_a_failed_request_fails_the_comparison() -> None:
    with pytest.raises(BenchmarkError, match="other: 1 of 2 requests failed, the first with: HTTP 500"):
        require_whole("other", [make_answer(), make_answer(error="HTTP 500")])


def test_medians_are_taken_figure_by_figure() -> None:
    median = median_figures([make_figures(3.0, 2.0), make_figures(1.0), make_figures(2.0, 4.0)])
    assert (median.output_tokens_per_second, median.tokens_per_forward) == (2.0, 3.0)
    assert median.end_to_end.p95 == 2.0


def test_ratios_are_within_rounds() -> None:
    """A machine that was slow in one round was slow for both."""
    over, under = [make_figures(20.0), make_figures(2.0)], [make_figures(10.0), make_figures(1.0)]
    assert median_ratio(over, under) == 2.0


def test_the_goals_are_compared_where_both_sides_were_measured() -> None:
    results = [
        make_measured(AR, 1, 50.0),
        make_measured(JACOBI, 1, 100.0),
        make_measured(AR, 4, 80.0),
        make_measured(JACOBI, 4, 120.0),
        make_measured(TRANSFORMERS, 1, 20.0),
        make_measured("engine alone", 1, 104.0),
    ]
    values = {ratio.name: ratio.text for ratio in ratios_of(results)}
    assert values == {
        "cllm Jacobi over transformers serve, concurrency 1": "5.00x",
        "cllm Jacobi over cllm AR, concurrency 1": "2.00x",
        "cllm Jacobi over cllm AR, concurrency 4": "1.50x",
        "cost of HTTP and IPC: cllm Jacobi below engine alone, concurrency 1": "3.8%",
    }
    assert not any(LLAMA in name for name in values)


def test_llama_server_is_compared_as_it_is_and_with_its_drafts() -> None:
    results = [
        *(make_measured(AR, 1, 60.0), make_measured(JACOBI, 1, 150.0), make_measured(JACOBI, 16, 400.0)),
        *(make_measured(LLAMA, 1, 50.0), make_measured(LLAMA, 16, 80.0)),
        make_measured("llama-server, ngram", 1, 75.0),
    ]
    assert {ratio.name: (ratio.text, ratio.must) for ratio in ratios_of(results) if LLAMA in ratio.name} == {
        "cllm AR over llama-server, concurrency 1": ("1.20x", "1.15x"),
        "cllm Jacobi over llama-server, concurrency 1": ("3.00x", "3x"),
        "cllm Jacobi over llama-server, concurrency 16": ("5.00x", "4x"),
        "cllm Jacobi over llama-server, ngram, concurrency 1": ("2.00x", ""),
    }


def test_texts_are_compared_prompt_by_prompt() -> None:
    reference = [make_answer(0, text="a"), make_answer(1, text="b")]
    assert share_of_same_text([make_answer(1, text="b"), make_answer(0, text="x")], reference) == 0.5
