"""Engine: requests in, accepted tokens out, one step at a time. What the worker and the offline API drive."""

import logging
import secrets
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass

import msgspec
import torch

from cllm_core.config import MAX_BLOCK_LENGTH, EngineConfig
from cllm_core.engine.adapters import ServedAdapter, ServedAdapters
from cllm_core.engine.block_pool import BlockPool
from cllm_core.engine.draft_length import DraftLengths
from cllm_core.engine.drafters.choice import SharedLengths
from cllm_core.engine.gated_length import GatedLengths, GatedRules
from cllm_core.engine.grammars import Grammars
from cllm_core.engine.memory import is_out_of_memory
from cllm_core.engine.plan import StepPlan, StepResult
from cllm_core.engine.request_state import RequestState
from cllm_core.engine.runner import LaunchedStep, ModelRunner
from cllm_core.engine.scheduler import Scheduler
from cllm_core.engine.step_deadline import StepDeadline
from cllm_core.engine.step_times import StepTimes
from cllm_core.errors import InvalidRequest, PromptTooLong
from cllm_core.info import EngineStats, ModelInfo
from cllm_core.models.adapter_bank import GATED_ADAPTER_ID
from cllm_core.models.source import locate_adapter_below
from cllm_core.request import NewRequest, RequestOutput

logger = logging.getLogger(__name__)

StepObserver = Callable[[StepPlan, StepResult], None]


@dataclass(frozen=True, slots=True)
class Learnt:
    """What an engine learnt of drafts from all requests: how far they are confirmed, and those of which source."""

    draft_lengths: DraftLengths | None
    gated_lengths: GatedLengths | None
    sources: SharedLengths


class Engine:
    """Batched Jacobi decoding of any number of requests.

    Not thread-safe: one thread calls it. Every request added ends in exactly one output with a finish_reason.

    Args:
        config: limits and policies.
        info: the loaded model's description and resolved limits.
        runner: computes plans.
        step_times: expected time of a step, which window lengths and prompt chunks are chosen by; kept current. None:
            every row gets its whole block, and a prompt as much of a step as is left.
        adapters: served beside the model; None: there are none and never will be.

    Attributes:
        info: the model, its limits and the adapters served now.
        observer: called with every plan and its result before it is booked; training records trajectories with it.
        runs_ahead: a step whose plan does not depend on the result of the one before is launched before that one is
            read. Off where the host itself computes: it would gain nothing.
    """

    def __init__(
        self,
        config: EngineConfig,
        info: ModelInfo,
        runner: ModelRunner,
        step_times: StepTimes | None = None,
        adapters: ServedAdapters | None = None,
    ) -> None:
        self.info = info
        self._adapters = adapters
        self._config = config
        self._adapter_root = config.adapter_root
        self.runner = runner
        self.block_pool = BlockPool(info.num_cache_blocks, info.cache_block_size, prefix_caching=config.prefix_caching)
        self._step_times = step_times
        self._deadline = StepDeadline(config.step_timeout, step_times)
        self._grammars = Grammars()
        self.scheduler = Scheduler(
            self.block_pool,
            max_num_seqs=config.max_num_seqs,
            max_batched_tokens=config.max_batched_tokens,
            draft_lengths=_draft_lengths(config, step_times),
            gated_lengths=_gated_lengths(config, info, step_times),
            step_times=step_times if config.prefill_step_seconds else None,
            prefill_step_seconds=config.prefill_step_seconds,
            queue_timeout=config.queue_timeout,
        )
        self.observer: StepObserver | None = None
        self.runs_ahead = runner.is_asynchronous
        self._ahead: LaunchedStep | None = None
        self._last_end = 0.0  # of the last step, on the clock of `time.perf_counter`
        self._was_awaited = True
        self._last_step = EngineStats(num_free_blocks=info.num_cache_blocks, num_cache_blocks=info.num_cache_blocks)

    def exchange_learnt(self, learnt: Learnt | None) -> Learnt:
        """Go on with what was learnt elsewhere, None for nothing, and give back what was learnt here.

        For measurements in turns, none of which may learn from another. Without work only.
        """
        drafting = self.runner.drafting
        sources = drafting.shared
        if learnt is None:
            lengths = _draft_lengths(self._config, self._step_times)
            gated = _gated_lengths(self._config, self.info, self._step_times)
            learnt = Learnt(lengths, gated, SharedLengths(len(drafting.sources)))
        drafting.shared = learnt.sources
        return Learnt(*self.scheduler.exchange_lengths(learnt.draft_lengths, learnt.gated_lengths), sources)

    def add_request(self, request: NewRequest) -> None:
        """Queue a request.

        Raises:
            InvalidRequest: a token id is out of range, the request id is in use, the adapter is not served, or no text
                matches the grammar.
            PromptTooLong: prompt and wanted output do not fit the context.
        """
        self._check(request)
        params = request.params
        adapter = self._adapter_of(request)
        model = self.info if adapter is None else adapter.info
        eos = frozenset() if params.ignore_eos else frozenset(model.eos_token_ids)
        constraint = None
        if params.grammar is not None:
            constraint = self._grammars.constraint(params.grammar, params, self.info, model)
        room = self.info.max_model_len - len(request.prompt_ids)
        self.scheduler.add(
            RequestState(
                request=request,
                seed=secrets.randbits(63) if params.seed is None else params.seed,
                block_length=params.block_length or model.block_length,
                max_tokens=room if params.max_tokens is None else params.max_tokens,
                stop_token_ids=eos | frozenset(params.stop_token_ids),
                constraint=constraint,
                adapter_id=0 if adapter is None else adapter.adapter_id,
                adapter_key="" if adapter is None else adapter.cache_key,
                is_gated=self.info.gated is not None and adapter is None and params.gated,
            )
        )

    def prepare(self, request: NewRequest) -> Future[None] | None:
        """Begin, on another thread, what `add_request` would take long for; None where it would not.

        Raises:
            InvalidRequest: the adapter is not served.
        """
        if request.params.grammar is None:
            return None
        adapter = self._adapter_of(request)
        return self._grammars.prepare(request.params.grammar, self.info, self.info if adapter is None else adapter.info)

    def load_adapter(self, name: str, path: str) -> None:
        """Serve another adapter; `path` must lie below adapter_root. The engine stands still meanwhile.

        Raises:
            ConfigError: the name is malformed.
            ModelLoadError: the adapter is out of bounds, cannot be used, or there is no room for it.
        """
        folder = locate_adapter_below(self._adapter_root, path)
        adapters = self._require_adapters()
        adapters.load(name, path, folder)
        self._update_info(adapters)

    def unload_adapter(self, name: str) -> None:
        """Take no more requests for an adapter; those that run finish with it (InvalidRequest where unknown)."""
        adapters = self._require_adapters()
        adapters.unload(name)
        adapters.drop_unused(self.scheduler.adapter_ids())
        self._update_info(adapters)

    def abort(self, request_id: str) -> None:
        """Stop a request, free what it holds, and report it as aborted in the next step. No-op where unknown."""
        self.scheduler.abort(request_id)

    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self.scheduler.has_work() or self._ahead is not None

    def step(self) -> list[RequestOutput]:
        """One forward pass over prompt chunks and Jacobi windows; returns what it brought each request."""
        self.scheduler.expire()
        # The device went on with a step ahead as soon as it was done with the one before.
        step, started = self._ahead, self._last_end
        if step is None:
            started = time.perf_counter()
            plan = self.scheduler.schedule()
            step = self._launch(plan)
            if step is None:
                self.scheduler.shrink_steps(plan)
                return self.scheduler.commit(StepPlan(rows=()), StepResult(rows=()))
        self._ahead = self._launch_behind(step)
        plan, result = step.plan, step.read()
        if self.observer is not None:
            self.observer(*self.scheduler.without_ended(plan, result))
        outputs = self.scheduler.commit(plan, result)
        if broken := self.scheduler.take_broken_blocks():
            self.runner.model.clear_blocks(broken)
        accepting = [output for output in outputs if output.token_ids]
        self._last_end = time.perf_counter()
        seconds = self._last_end - started
        self._observe_time(step, seconds)
        self._deadline.on_step()
        self._last_step = EngineStats(
            num_cache_blocks=self.block_pool.num_blocks,
            num_steps=self._last_step.num_steps + 1,
            step_seconds=seconds,
            num_step_tokens=plan.num_tokens,
            accepted_per_row=tuple(len(output.token_ids) for output in accepting),
            adapter_per_row=self._adapter_per_row(plan, accepting),
        )
        if self._adapters is not None and self._adapters.has_leaving:
            self._adapters.drop_unused(self.scheduler.adapter_ids())
        return outputs

    def stats(self) -> EngineStats:
        """The state now, and figures of the last step."""
        last = self._last_step
        return EngineStats(
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting,
            num_free_blocks=self.block_pool.num_free,
            num_cache_blocks=last.num_cache_blocks,
            num_steps=last.num_steps,
            step_seconds=last.step_seconds,
            num_step_tokens=last.num_step_tokens,
            accepted_per_row=last.accepted_per_row,
            adapter_per_row=last.adapter_per_row,
        )

    def step_deadline(self) -> float:
        """Seconds after which the next step counts as hung; infinite where step_timeout is 0."""
        return self._deadline.seconds(self.scheduler.num_wanted_tokens, is_cold=self.runner.may_capture())

    def check(self) -> None:
        """Raise BlockPoolCorrupted unless every cache block is free or held by a running request."""
        self.scheduler.check()

    def _launch_behind(self, step: LaunchedStep) -> LaunchedStep | None:
        """The step behind this one, where it can be launched already."""
        plan = self.scheduler.schedule_ahead(step.plan) if self.runs_ahead else None
        return None if plan is None else self._launch(plan, behind=step)

    def _launch(self, plan: StepPlan, *, behind: LaunchedStep | None = None) -> LaunchedStep | None:
        """Give a plan to the device; None where that ran out of memory: it can be planned again, smaller."""
        try:
            return self.runner.launch(plan, behind=behind)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("a step of %d tokens ran out of memory: %s", plan.num_tokens, error)
        # Outside of the handler: the error holds on to the tensors of the step.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def _observe_time(self, step: LaunchedStep, seconds: float) -> None:
        """Learn from the time of a step, unless it holds more or less than the step."""
        if self._step_times is None or not step.plan.rows:
            return
        # A step that nobody waited for goes on in the time of the next one.
        is_whole = step.is_awaited and self._was_awaited
        self._was_awaited = step.is_awaited
        has_captured = step.has_captured or (self._ahead is not None and self._ahead.has_captured)
        if is_whole and not has_captured:
            self._step_times.observe(step.plan.num_tokens, seconds)

    def _require_adapters(self) -> ServedAdapters:
        if self._adapters is None:
            raise InvalidRequest("this engine serves no adapters: name some in adapters, or set adapter_root")
        return self._adapters

    def _adapter_of(self, request: NewRequest) -> ServedAdapter | None:
        return self._require_adapters().get(request.adapter) if request.adapter else None

    def _update_info(self, adapters: ServedAdapters) -> None:
        self.info = msgspec.structs.replace(self.info, adapters=adapters.infos)

    def _adapter_per_row(self, plan: StepPlan, accepting: Iterable[RequestOutput]) -> tuple[str, ...]:
        """Names of the adapters of the requests that accepted tokens; empty where no row has one."""
        if self._adapters is None or not any(row.adapter_id for row in plan.rows):
            return ()
        adapter_ids = {row.request_id: row.adapter_id for row in plan.rows}
        return tuple(self._adapters.name_of(adapter_ids[output.request_id]) for output in accepting)

    def _check(self, request: NewRequest) -> None:
        vocab_size, limit = self.info.vocab_size, self.info.max_model_len
        if self.scheduler.knows(request.request_id):
            raise InvalidRequest(f"request_id={request.request_id!r} is in use: give each request its own")
        if not request.prompt_ids:
            raise InvalidRequest("the prompt is empty: give at least one token", param="prompt")
        for name, ids in (
            ("prompt", request.prompt_ids),
            ("prediction", request.prediction_ids),
            ("logit_bias", request.params.logit_bias),
            ("stop_token_ids", request.params.stop_token_ids),
        ):
            if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
                wrong = next(i for i in ids if not 0 <= i < vocab_size)
                raise InvalidRequest(f"{name} holds token id {wrong}: valid ids are 0..{vocab_size - 1}", param=name)
        names = [drafter.name for drafter in self.info.drafters]
        for name in request.params.drafters or ():
            if name not in names:
                raise InvalidRequest(
                    f"drafters: this server has no {name!r}; it has {', '.join(names)} (--drafters)", param="drafters"
                )
        num_prompt, max_tokens = len(request.prompt_ids), request.params.max_tokens
        if num_prompt + (1 if max_tokens is None else max_tokens) > limit:
            wanted = f"{num_prompt} prompt tokens" + ("" if max_tokens is None else f" and max_tokens={max_tokens}")
            raise PromptTooLong(f"{wanted} do not fit the context of {limit} tokens: shorten them", param="prompt")


def _draft_lengths(config: EngineConfig, step_times: StepTimes | None) -> DraftLengths | None:
    if step_times is None or not config.adaptive_block_length:
        return None
    return DraftLengths(step_times, max_window=min(MAX_BLOCK_LENGTH, config.max_batched_tokens))


def _gated_lengths(config: EngineConfig, info: ModelInfo, step_times: StepTimes | None) -> GatedLengths | None:
    if info.gated is None:
        return None
    rules = GatedRules(GATED_ADAPTER_ID, config.gated_form, info.gated.max_rows)
    adaptive = step_times if config.adaptive_block_length else None
    return GatedLengths(rules, adaptive, max_window=min(MAX_BLOCK_LENGTH, config.max_batched_tokens))
