"""Answers as a run would record them."""

from cllm_core.evaluation.records import Answer


def make_answer(
    *,
    model: str = "model",
    block_length: int = 1,
    example: str = "0",
    num_tokens: int = 10,
    num_passes: int = 10,
    num_prefill_tokens: int = 1,
    num_stationary: int = 0,
    scores: dict[str, float] | None = None,
    seconds: tuple[float, ...] = (),
    first_seconds: tuple[float, ...] = (),
    first_token: int = 0,
) -> Answer:
    return Answer(
        model=model,
        block_length=block_length,
        example=example,
        text="text",
        token_ids=tuple(range(first_token, first_token + num_tokens)),
        finish_reason="stop",
        num_passes=num_passes,
        num_prefill_passes=1,
        num_prefill_tokens=num_prefill_tokens,
        num_fast_forwarded=num_tokens - num_passes,
        num_stationary=num_stationary,
        repetition=0.0,
        scores=scores or {},
        seconds=seconds,
        first_seconds=first_seconds,
    )
