"""Outbox: outputs and figures of steps that one client of the worker was not sent yet.

Steps are short compared to the cost of a message, which is paid in both processes by the cores that compute. So
outputs that are not urgent wait a little and go with those of the next steps. A client without requests is sent one
small report a second, since nothing bounds how long the requests of others run.
"""

import math
import time
from collections.abc import Callable, Iterable

import msgspec

from cllm_core.info import EngineStats
from cllm_core.request import RequestOutput
from cllm_core.worker.messages import StepReport

# Seconds from a report to the next where it has figures alone: for gauges, which are read rarely.
FIGURES_INTERVAL = 1.0


class Outbox:
    """Gathers outputs and figures of steps into reports.

    First and last outputs of a request go at once, and all others with them. Steps without outputs become one whose
    rows are those of all, and wait longer.

    Args:
        interval: seconds from a report to the next, where no output is urgent; 0 sends one after every step with
            outputs.
        clock: the time in seconds.
    """

    def __init__(self, interval: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval = interval
        self._clock = clock
        self._outputs: list[RequestOutput] = []
        self._indices: dict[str, int] = {}  # of the latest output of each request
        self._steps: list[EngineStats] = []
        self._is_urgent = False
        self._sent_at = -math.inf

    @property
    def has_outputs(self) -> bool:
        """Whether it holds outputs, not only figures."""
        return bool(self._outputs)

    def add(self, outputs: Iterable[RequestOutput], step: EngineStats, *, urgent: bool = False) -> None:
        """Add the outputs and figures of a step.

        Args:
            outputs: of the client's requests.
            step: figures of the step.
            urgent: it must not wait.
        """
        if self._steps and not self._outputs:
            step = _merge(self._steps.pop(), step)
        self._steps.append(step)
        self._is_urgent = self._is_urgent or urgent
        for output in outputs:
            self._add(output)
            is_first = output.stats.num_output_tokens == len(output.token_ids)
            self._is_urgent = self._is_urgent or is_first or output.finish_reason is not None

    def take_due(self) -> StepReport | None:
        """Everything, if it is time to send it."""
        interval = self._interval if self._outputs else max(self._interval, FIGURES_INTERVAL)
        now = self._clock()
        if not self._is_urgent and now < self._sent_at + interval:
            return None
        self._sent_at = now
        return self.take()

    def take(self) -> StepReport | None:
        """Everything; None where there is nothing."""
        if not self._steps:
            return None
        report = StepReport(tuple(self._outputs), tuple(self._steps))
        self._outputs, self._indices, self._steps, self._is_urgent = [], {}, [], False
        return report

    def _add(self, output: RequestOutput) -> None:
        index = self._indices.get(output.request_id)
        # An abort or error holds no tokens, so those before it stay an output of their own.
        if index is None or output.finish_reason in {"abort", "error"}:
            self._indices[output.request_id] = len(self._outputs)
            self._outputs.append(output)
        else:
            self._outputs[index] = self._outputs[index].followed_by(output)


def _merge(earlier: EngineStats, later: EngineStats) -> EngineStats:
    """The state after the later of two steps, with the rows of both."""
    adapters: tuple[str, ...] = ()
    if earlier.adapter_per_row or later.adapter_per_row:
        adapters = tuple(name for step in (earlier, later) for name in _adapters(step))
    return msgspec.structs.replace(
        later, accepted_per_row=earlier.accepted_per_row + later.accepted_per_row, adapter_per_row=adapters
    )


def _adapters(step: EngineStats) -> tuple[str, ...]:
    """The adapter of each row."""
    return step.adapter_per_row or ("",) * len(step.accepted_per_row)
