"""What waits, what goes at once, and that nothing is lost in between."""

import random
from collections.abc import Iterable

import pytest

from cllm_core.info import EngineStats
from cllm_core.request import DecodingStats, FinishReason, RequestOutput, TokenLogprobs
from cllm_core.worker.messages import StepReport
from cllm_core.worker.outbox import Outbox

INTERVAL = 0.02


class Clock:
    """Stands still until it is set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Sender:
    """Puts outputs of one token into an outbox, step by step."""

    def __init__(self, interval: float = INTERVAL) -> None:
        self.clock = Clock()
        self.outbox = Outbox(interval, self.clock)
        self._num_output = 0

    def step(self, finish_reason: FinishReason | None = None, *, urgent: bool = False) -> StepReport | None:
        self._num_output += 1
        stats = DecodingStats(num_prompt_tokens=1, num_output_tokens=self._num_output)
        output = RequestOutput(request_id="a", token_ids=(self._num_output,), finish_reason=finish_reason, stats=stats)
        self.outbox.add([output], EngineStats(num_steps=self._num_output), urgent=urgent)
        return self.outbox.take_due()


def tokens(report: StepReport | None) -> tuple[int, ...]:
    assert report is not None
    return report.outputs[0].token_ids


def test_the_first_tokens_go_at_once_and_the_next_wait_for_the_interval() -> None:
    sender = Sender()
    assert tokens(sender.step()) == (1,)
    assert [sender.step(), sender.step()] == [None, None]
    sender.clock.now += INTERVAL
    assert tokens(sender.step()) == (2, 3, 4)


def test_the_last_tokens_go_at_once_with_those_that_waited() -> None:
    sender = Sender()
    sender.step()
    sender.step()
    report = sender.step("length")
    assert tokens(report) == (2, 3)
    assert report is not None
    assert report.outputs[0].finish_reason == "length"


@pytest.mark.parametrize("reason", ["error", "abort"])
def test_tokens_that_waited_come_before_an_end_that_is_none(reason: FinishReason) -> None:
    """What reads an error gives no tokens to its client any more."""
    sender = Sender()
    for _ in range(3):
        sender.step()
    report = sender.step(reason)
    assert report is not None
    assert [(output.token_ids, output.finish_reason) for output in report.outputs] == [((2, 3), None), ((4,), reason)]


def test_one_urgent_output_takes_all_along() -> None:
    sender = Sender()
    sender.step()
    sender.step()
    assert tokens(sender.step(urgent=True)) == (2, 3)
    assert sender.step() is None


def test_without_an_interval_every_step_is_a_report() -> None:
    sender = Sender(interval=0.0)
    assert [tokens(sender.step()) for _ in range(4)] == [(1,), (2,), (3,), (4,)]


def rows(steps: Iterable[EngineStats]) -> list[tuple[int, str]]:
    """What metrics count: accepted tokens and adapter of each row."""
    return [
        row
        for step in steps
        for row in zip(step.accepted_per_row, step.adapter_per_row or [""] * len(step.accepted_per_row), strict=True)
    ]


@pytest.mark.parametrize("interval", [0.0, INTERVAL])
def test_a_client_without_requests_hears_once_a_second_and_of_every_row(interval: float) -> None:
    """A message for each step would pile up without end for a client that hangs."""
    clock, rng = Clock(), random.Random(0)
    outbox, reports, steps = Outbox(interval, clock), [], []
    for number in range(1, 1001):
        clock.now += 0.01
        accepted = tuple(rng.randint(1, 16) for _ in range(rng.randint(0, 3)))
        adapters = rng.choice([(), tuple(rng.choice(["", "sql"]) for _ in accepted)])
        steps.append(EngineStats(num_steps=number, accepted_per_row=accepted, adapter_per_row=adapters))
        outbox.add([], steps[-1])
        reports.append(outbox.take_due())
    reports.append(outbox.take())
    sent = [report for report in reports if report is not None]
    assert 10 <= len(sent) <= 12
    assert [len(report.steps) for report in sent] == [1] * len(sent)
    assert rows(report.steps[0] for report in sent) == rows(steps)
    assert sent[-1].steps[0].num_steps == 1000
    assert outbox.take() is None


def test_steps_before_the_first_output_are_counted_with_it() -> None:
    sender = Sender()
    for number in range(3):
        sender.outbox.add([], EngineStats(num_steps=number, accepted_per_row=(2,)))
    report = sender.step()
    assert tokens(report) == (1,)
    assert report is not None
    assert rows(report.steps) == [(2, "")] * 3


def test_outputs_put_together_say_what_they_said_apart() -> None:
    rng = random.Random(0)
    apart = [_output(number, rng.randint(0, 4), is_last=number == 9) for number in range(10)]
    together = apart[0]
    for output in apart[1:]:
        together = together.followed_by(output)
    assert together.token_ids == tuple(token_id for output in apart for token_id in output.token_ids)
    assert together.logprobs == tuple(found for output in apart for found in output.logprobs or ())
    assert together.prompt_logprobs == apart[0].prompt_logprobs
    assert (together.finish_reason, together.stats, together.draft_ids) == ("stop", apart[-1].stats, (109,))


def _output(number: int, num_tokens: int, *, is_last: bool) -> RequestOutput:
    token_ids = tuple(10 * number + index for index in range(num_tokens))
    return RequestOutput(
        request_id="a",
        token_ids=token_ids,
        logprobs=tuple(TokenLogprobs(-float(token_id), (), ()) for token_id in token_ids),
        prompt_logprobs=(TokenLogprobs(-1.0, (), ()),) if number == 0 else None,
        finish_reason="stop" if is_last else None,
        draft_ids=(100 + number,),
        stats=DecodingStats(num_prompt_tokens=1, num_output_tokens=number),
    )
