"""Answers and figures with the values that a test cares about."""

from benchmarks.served.measure import Measured
from benchmarks.served.records import Answer
from benchmarks.served.summary import Figures, Percentiles


def make_answer(prompt: int = 0, **values: object) -> Answer:
    """Ten tokens: the first text, of one, after 1 s, the last after 10 s."""
    fields: dict[str, object] = {
        "started": 0.0,
        "first": 1.0,
        "last": 10.0,
        "finished": 10.0,
        "text": "ten tokens",
        "first_text": "ten",
        "finish_reason": "length",
        "num_tokens": 10,
    }
    return Answer(prompt=prompt, **{**fields, **values})  # type: ignore[arg-type]


def count_words(text: str) -> int:
    """Stands in for a tokenizer."""
    return len(text.split())


def make_figures(tokens_per_second: float = 1.0, tokens_per_forward: float | None = None) -> Figures:
    """Of a load with this throughput."""
    return Figures(
        output_tokens_per_second=tokens_per_second,
        requests_per_second=1.0,
        first_token=Percentiles(0.1, 0.2),
        inter_token=Percentiles(0.01, 0.02),
        end_to_end=Percentiles(1.0, 2.0),
        num_tokens=100,
        tokens_per_forward=tokens_per_forward,
    )


def make_measured(server: str, concurrency: int, *speeds: float) -> Measured:
    """A server whose rounds had these output tokens per second."""
    rounds = [make_figures(speed) for speed in speeds]
    return Measured(server=server, concurrency=concurrency, rounds=rounds, same_text=1.0)
