"""From single answers to the figures of a model at a block length, and of a CLLM over its target. No torch in here."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from cllm_core.evaluation.records import Answer
from cllm_core.evaluation.trajectory import has_run

AR = 1  # block length of plain decoding
LOOP_LENGTH = 10  # equal tokens in a row, which keep an answer out of the paper's counts
MAX_VARIED_REPETITION = 0.1  # rep-4 of answers that do not loop


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of one model at one block length over all examples.

    Attributes:
        model: role of the model, "target" or "model".
        block_length: n in tokens, 1 is AR.
        num_answers: that the figures are of.
        scores: mean of each measure of the task, 0..1.
        tokens_per_forward: accepted tokens per forward pass, prefill not counted: passes that computed prompt tokens,
            and what they yielded, are left out, so AR has 1.
        tokens_per_forward_all: the same with every pass that yielded tokens.
        tokens_per_forward_varied: tokens_per_forward of the answers whose rep-4 is at most MAX_VARIED_REPETITION: an
            answer that loops is drafted by copying, whatever the model was trained for. None where all loop.
        tokens_per_second: median over the answers, prefill included; None where times were not measured.
        decode_tokens_per_second: the same from the first tokens on.
        speedup, decode_speedup: median over the examples of this model's tokens per second at n over those at 1.
        fast_forwarded_per_block, stationary_per_block: tokens per n tokens of output.
        paper_fast_forwarded: as the original code counts for table 3 of arXiv:2403.00835: newly right tokens per
            iteration behind the prefill, AR's one included, as a mean over the answers in which no token stands
            LOOP_LENGTH times in a row. None where all have one, or none has such an iteration.
        paper_stationary: stationary tokens per n tokens, as a mean over the same answers.
        same_as_ar: share of answers equal, token for token, to this model's at n = 1.
        mean_tokens: length of an answer.
        finished: share of answers that ended before the limit.
        repetition: mean rep-4.
        perplexity: of the answers under the reference model, over all their tokens; None where not measured.
    """

    model: str
    block_length: int
    num_answers: int
    scores: dict[str, float]
    tokens_per_forward: float
    tokens_per_forward_all: float
    tokens_per_forward_varied: float | None
    tokens_per_second: float | None
    decode_tokens_per_second: float | None
    speedup: float | None
    decode_speedup: float | None
    fast_forwarded_per_block: float
    stationary_per_block: float
    paper_fast_forwarded: float | None = None
    paper_stationary: float | None = None
    same_as_ar: float
    mean_tokens: float
    finished: float
    repetition: float
    perplexity: float | None = None


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """A CLLM at its best block length over its target; ratios are None where the target has 0.

    Attributes:
        model_block_length, target_block_length: the best of each.
        scores: measure -> CLLM's at its best n minus the target's at n = 1.
        tokens_per_forward, fast_forwarded, stationary: CLLM's over the target's, each at its best n.
        speedup: CLLM's at its best n over itself at n = 1, in one engine and in turns; None where not measured. The
            target's own times are of another hour, so they are no measure.
        perplexity: CLLM's over the target's at n = 1, of their own answers; None where not measured.
        repetition: CLLM's minus the target's at n = 1.
    """

    model_block_length: int
    target_block_length: int
    scores: dict[str, float]
    tokens_per_forward: float | None
    fast_forwarded: float | None
    stationary: float | None
    speedup: float | None
    perplexity: float | None
    repetition: float


def summarise(answers: Sequence[Answer], likelihoods: Mapping[tuple[str, int, str], float]) -> list[Cell]:
    """One cell per model and block length, in the order in which they come.

    Args:
        answers: each (model, block length, example) once.
        likelihoods: negative log-likelihood by `Answer.key`; answers without one count for no perplexity.
    """
    groups: dict[tuple[str, int], list[Answer]] = {}
    for answer in answers:
        groups.setdefault((answer.model, answer.block_length), []).append(answer)
    return [
        _cell(group, {answer.example: answer for answer in groups.get((model, AR), [])}, likelihoods)
        for (model, _), group in groups.items()
    ]


def best_cell(cells: Sequence[Cell], model: str) -> Cell | None:
    """The cell of the block length above 1 with the most tokens per second, or per forward pass without times."""
    own = [cell for cell in cells if cell.model == model and cell.block_length > AR]
    return max(own, key=lambda cell: (cell.tokens_per_second or 0.0, cell.tokens_per_forward), default=None)


def compare(cells: Sequence[Cell], model: str, target: str) -> Comparison | None:
    """The model over the target; None unless both were run at n = 1 and above."""
    best, target_best = best_cell(cells, model), best_cell(cells, target)
    plain = next((cell for cell in cells if (cell.model, cell.block_length) == (target, AR)), None)
    if best is None or target_best is None or plain is None:
        return None
    return Comparison(
        model_block_length=best.block_length,
        target_block_length=target_best.block_length,
        scores={name: score - plain.scores[name] for name, score in best.scores.items()},
        tokens_per_forward=_ratio(best.tokens_per_forward, target_best.tokens_per_forward),
        fast_forwarded=_ratio(best.fast_forwarded_per_block, target_best.fast_forwarded_per_block),
        stationary=_ratio(best.stationary_per_block, target_best.stationary_per_block),
        speedup=best.speedup,
        perplexity=_ratio(best.perplexity, plain.perplexity),
        repetition=best.repetition - plain.repetition,
    )


def _cell(
    answers: Sequence[Answer], plain: Mapping[str, Answer], likelihoods: Mapping[tuple[str, int, str], float]
) -> Cell:
    num_tokens = sum(answer.num_tokens for answer in answers)
    num_passes = sum(answer.num_passes for answer in answers)
    varied = [answer for answer in answers if answer.repetition <= MAX_VARIED_REPETITION]
    num_blocks = num_tokens / answers[0].block_length
    unlooped = [answer for answer in answers if not has_run(answer.token_ids, LOOP_LENGTH)]
    pairs = [(answer, plain[answer.example]) for answer in answers if answer.example in plain]
    return Cell(
        model=answers[0].model,
        block_length=answers[0].block_length,
        num_answers=len(answers),
        scores={name: statistics.fmean(answer.scores[name] for answer in answers) for name in answers[0].scores},
        tokens_per_forward=tokens_per_forward_of(answers) or 0.0,
        tokens_per_forward_all=num_tokens / num_passes,
        tokens_per_forward_varied=tokens_per_forward_of(varied),
        tokens_per_second=_median(_rate(answer) for answer in answers),
        decode_tokens_per_second=_median(_decode_rate(answer) for answer in answers),
        speedup=_median(_ratio(_rate(answer), _rate(base)) for answer, base in pairs),
        decode_speedup=_median(_ratio(_decode_rate(answer), _decode_rate(base)) for answer, base in pairs),
        fast_forwarded_per_block=sum(answer.num_fast_forwarded for answer in answers) / num_blocks,
        stationary_per_block=sum(answer.num_stationary for answer in answers) / num_blocks,
        paper_fast_forwarded=_mean(tokens_per_forward_of([answer]) for answer in unlooped),
        paper_stationary=_mean(answer.num_stationary * answer.block_length / answer.num_tokens for answer in unlooped),
        same_as_ar=statistics.fmean(answer.token_ids == base.token_ids for answer, base in pairs) if pairs else 0.0,
        mean_tokens=num_tokens / len(answers),
        finished=statistics.fmean(answer.finish_reason == "stop" for answer in answers),
        repetition=statistics.fmean(answer.repetition for answer in answers),
        perplexity=_perplexity(answers, likelihoods),
    )


def tokens_per_forward_of(answers: Sequence[Answer]) -> float | None:
    """Prefill not counted; None where there is nothing else."""
    num_tokens = sum(answer.num_tokens - answer.num_prefill_tokens for answer in answers)
    num_passes = sum(answer.num_passes - answer.num_prefill_passes for answer in answers)
    return num_tokens / num_passes if num_passes else None


def _rate(answer: Answer) -> float | None:
    """Tokens per second, prefill included: the median of the repeats."""
    return answer.num_tokens / statistics.median(answer.seconds) if answer.seconds else None


def _decode_rate(answer: Answer) -> float | None:
    """Tokens per second after the pass that read the prompt; None where that pass gave all of them."""
    decoded = answer.num_tokens - answer.num_prefill_tokens
    if not answer.seconds or not decoded:
        return None
    times = zip(answer.seconds, answer.first_seconds, strict=True)
    return decoded / statistics.median(total - first for total, first in times)


def _perplexity(answers: Sequence[Answer], likelihoods: Mapping[tuple[str, int, str], float]) -> float | None:
    scored = [answer for answer in answers if answer.key in likelihoods]
    if not scored:
        return None
    return math.exp(sum(likelihoods[answer.key] for answer in scored) / sum(answer.num_tokens for answer in scored))


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None
