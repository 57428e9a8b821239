"""From single answers to figures: of one load, and the medians over its repetitions."""

import statistics
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from benchmarks.served.records import Answer, BenchmarkError


class Percentiles(msgspec.Struct, frozen=True):
    """Of a time over the requests of a load, in seconds."""

    p50: float
    p95: float


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """One server under one load.

    Attributes:
        output_tokens_per_second, requests_per_second: over the whole load, first request to last answer.
        first_token: from the request to the first text.
        inter_token: of a request, from its first to its last text over the tokens behind its first chunk; a chunk may
            bring several tokens, so this is the mean time of one and not the gap between chunks. Answers in one chunk
            are left out; 0 where there are no others.
        end_to_end: from the request to the end of the stream.
        num_tokens: of all answers.
        tokens_per_forward: TPF over all answers; None where the server does not tell.
    """

    output_tokens_per_second: float
    requests_per_second: float
    first_token: Percentiles
    inter_token: Percentiles
    end_to_end: Percentiles
    num_tokens: float
    tokens_per_forward: float | None = None


def require_whole(server: str, answers: list[Answer]) -> list[Answer]:
    """The answers; BenchmarkError where one is an error, for figures of the others would not compare."""
    failed = [answer.error for answer in answers if answer.error is not None]
    if failed:
        raise BenchmarkError(f"{server}: {len(failed)} of {len(answers)} requests failed, the first with: {failed[0]}")
    return answers


def figures_of(answers: Sequence[Answer], count_tokens: Callable[[str], int]) -> Figures:
    """The figures of one load.

    Args:
        answers: of all requests, none of them an error.
        count_tokens: of a text: the first of an answer, and the whole of one whose server does not tell.
    """
    counts = [_num_tokens(answer, count_tokens) for answer in answers]
    per_token = [_seconds_per_token(*one, count_tokens) for one in zip(answers, counts, strict=True)]
    passes = [answer.num_forward_passes for answer in answers if answer.num_forward_passes is not None]
    seconds = max(answer.finished for answer in answers) - min(answer.started for answer in answers)
    return Figures(
        output_tokens_per_second=sum(counts) / seconds,
        requests_per_second=len(answers) / seconds,
        first_token=_percentiles([(answer.first or answer.finished) - answer.started for answer in answers]),
        inter_token=_percentiles([time for time in per_token if time is not None]),
        end_to_end=_percentiles([answer.finished - answer.started for answer in answers]),
        num_tokens=sum(counts),
        tokens_per_forward=sum(counts) / sum(passes) if len(passes) == len(answers) else None,
    )


def median_figures(rounds: Sequence[Figures]) -> Figures:
    """Each figure's median over the rounds of a load."""

    def median(value: Callable[[Figures], float]) -> float:
        return statistics.median(map(value, rounds))

    def of_percentiles(value: Callable[[Figures], Percentiles]) -> Percentiles:
        return Percentiles(median(lambda one: value(one).p50), median(lambda one: value(one).p95))

    tpf = [one.tokens_per_forward for one in rounds if one.tokens_per_forward is not None]
    return Figures(
        output_tokens_per_second=median(lambda one: one.output_tokens_per_second),
        requests_per_second=median(lambda one: one.requests_per_second),
        first_token=of_percentiles(lambda one: one.first_token),
        inter_token=of_percentiles(lambda one: one.inter_token),
        end_to_end=of_percentiles(lambda one: one.end_to_end),
        num_tokens=median(lambda one: one.num_tokens),
        tokens_per_forward=statistics.median(tpf) if tpf else None,
    )


def median_ratio(over: Sequence[Figures], under: Sequence[Figures]) -> float:
    """How many times the output tokens per second: the median over rounds of the ratio within a round."""
    pairs = zip(over, under, strict=True)
    return statistics.median(one.output_tokens_per_second / other.output_tokens_per_second for one, other in pairs)


def share_of_same_text(answers: Sequence[Answer], reference: Sequence[Answer]) -> float:
    """Share of the prompts that both answered with the same text: a check that they serve the same model."""
    texts = {answer.prompt: answer.text for answer in reference}
    return sum(texts[answer.prompt] == answer.text for answer in answers) / len(answers)


def _num_tokens(answer: Answer, count_tokens: Callable[[str], int]) -> int:
    """As the server tells; else those of the text, and the end token where one ended it."""
    if answer.num_tokens is not None:
        return answer.num_tokens
    return count_tokens(answer.text) + (answer.finish_reason == "stop")


def _seconds_per_token(answer: Answer, num_tokens: int, count_tokens: Callable[[str], int]) -> float | None:
    """Mean time of a token behind the first chunk, all of whose tokens were there at `first`; None without any."""
    if answer.first is None or answer.last is None or answer.text == answer.first_text:
        return None
    num_behind = num_tokens - count_tokens(answer.first_text)
    return (answer.last - answer.first) / num_behind if num_behind > 0 else None


def _percentiles(values: Sequence[float]) -> Percentiles:
    if not values:
        return Percentiles(0.0, 0.0)
    p50, p95 = np.percentile(values, [50, 95])
    return Percentiles(float(p50), float(p95))
