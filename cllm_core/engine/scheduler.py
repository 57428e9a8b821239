"""The Scheduler decides which tokens are computed next. It never sees a tensor.

There are no phases: a request computes its tokens that are not computed yet - a chunk of the prompt, or the last
accepted token - and, once no known token is left over, a draft behind them. Prompt chunks and Jacobi windows share
one token budget per step.

Users take turns to be admitted (see WaitingQueue). From then on it is first come, first served: a request never loses
its cache blocks to one that was admitted later, and the oldest always advances, so none starves.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import islice, takewhile

from cllm_core.engine.block_pool import BlockHash, BlockPool
from cllm_core.engine.draft_length import DraftLengths
from cllm_core.engine.gated_length import GatedLengths, GatedRow
from cllm_core.engine.plan import Admission, GatedBlocks, PlannedRow, RowResult, StepPlan, StepResult
from cllm_core.engine.request_state import RequestState
from cllm_core.engine.step_times import StepTimes
from cllm_core.engine.waiting_queue import WaitingQueue
from cllm_core.request import ErrorCode, RequestOutput, TokenLogprobs


class Scheduler:
    """Admits, plans, preempts, and books what a step brought.

    Args:
        block_pool: the KV cache's blocks; the scheduler is the only one who takes from it.
        max_num_seqs: requests that run together, each in a slot of its own.
        max_batched_tokens: token budget of one step; at least max_num_seqs.
        draft_lengths: chooses window lengths by load and acceptance; None gives every row its whole block, or an equal
            share of the budget where that is less.
        gated_lengths: chooses the blocks of gated rows; None where no gated adapter is loaded.
        step_times: expected time of a step, which prompt chunks are sized by; None leaves them the whole budget.
        prefill_step_seconds: longest step that a chunk may make while other requests stream.
        queue_timeout: seconds that a request may wait to be admitted for the first time; None sets no limit.
        clock: the time in seconds.
    """

    def __init__(
        self,
        block_pool: BlockPool,
        *,
        max_num_seqs: int,
        max_batched_tokens: int,
        draft_lengths: DraftLengths | None = None,
        gated_lengths: GatedLengths | None = None,
        step_times: StepTimes | None = None,
        prefill_step_seconds: float = 0.0,
        queue_timeout: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.block_pool = block_pool
        self.max_batched_tokens = max_batched_tokens
        self._draft_lengths = draft_lengths
        self._gated_lengths = gated_lengths
        self._step_times = step_times
        self._prefill_step_seconds = prefill_step_seconds
        self._queue_timeout = queue_timeout
        self._clock = clock
        self._waiting = WaitingQueue()
        self._running: list[RequestState] = []  # oldest first
        self._by_id: dict[str, RequestState] = {}
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._vacated: list[int] = []  # since the last plan
        self._broken_blocks: list[int] = []
        self._step_limit = max_batched_tokens  # less for a while after a step ran out of memory
        self._ended: list[RequestOutput] = []  # outside of a step

    @property
    def num_running(self) -> int:
        """Requests that hold a slot."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for one."""
        return len(self._waiting)

    @property
    def num_wanted_tokens(self) -> int:
        """Upper bound on the tokens of the next step."""
        if self._gated_lengths is not None:  # their blocks take what is left
            return self.max_batched_tokens
        newcomers = islice(self._waiting, len(self._free_slots))
        wanted = sum(state.num_pending + state.max_window for state in (*self._running, *newcomers))
        return min(wanted, self.max_batched_tokens)

    def exchange_lengths(
        self, draft_lengths: DraftLengths | None, gated_lengths: GatedLengths | None
    ) -> tuple[DraftLengths | None, GatedLengths | None]:
        """Choose lengths by these from now on, and give back those in use; without work only."""
        before = self._draft_lengths, self._gated_lengths
        self._draft_lengths, self._gated_lengths = draft_lengths, gated_lengths
        return before

    def has_work(self) -> bool:
        """Whether a step would do anything, be it to report an abort."""
        return bool(self._by_id or self._ended)

    def knows(self, request_id: str) -> bool:
        """Whether this request is waiting or running."""
        return request_id in self._by_id

    def adapter_ids(self) -> set[int]:
        """Of the requests that run or wait; 0 stands for those without an adapter."""
        return {state.adapter_id for state in self._by_id.values()}

    def add(self, state: RequestState) -> None:
        """Queue a request that the block pool can hold as a whole."""
        state.queued_at = self._clock()
        self._by_id[state.request_id] = state
        self._waiting.add(state)

    def abort(self, request_id: str) -> None:
        """Drop a request and free what it holds; its final output comes with the next commit. No-op where unknown."""
        state = self._by_id.get(request_id)
        if state is None:
            return
        self._remove(state)
        self._ended.append(RequestOutput(request_id=request_id, finish_reason="abort", stats=state.stats))

    def expire(self) -> None:
        """End the requests that waited for too long; their final outputs come with the next commit."""
        if self._queue_timeout is None or not self._waiting:
            return
        latest = self._clock() - self._queue_timeout
        # Preempted ones stand in front; they have been admitted before.
        for state in [s for s in self._waiting if s.queued_at < latest and not s.num_preemptions]:
            self._remove(state)
            error = f"the request waited in the queue for {self._queue_timeout:g} s, the limit (--queue-timeout)"
            self._ended.append(_error_output(state, f"{error}: try again later", "queue_timeout"))

    def schedule(self) -> StepPlan:
        """Plan one forward pass: running requests first, oldest first, then new ones in the order of the queue."""
        max_tokens = self._max_step_tokens()
        windows = self._choose_windows(max_tokens)
        blocks = self._choose_blocks(windows, max_tokens)
        wanted = {state.request_id: _num_wanted(state, windows, blocks) for state in self._running}
        budget = _TokenBudget(max_tokens, len(self._running), wanted)
        granted: list[tuple[RequestState, int]] = []  # and the tokens it may compute
        num_preempted = 0
        # A copy, since preemption shortens the list from its young end while we walk it from the old one.
        for state in list(self._running):
            if state.slot is None:
                continue
            num_tokens = budget.grant(state)
            has_room, preempted = self._make_room(state, min(num_tokens, state.num_pending))
            num_preempted += preempted
            if has_room:
                granted.append((state, num_tokens))
                budget.spend(num_tokens)
        admissions = [] if num_preempted else list(self._admit(budget, windows, blocks, granted))
        # Drafts and gated blocks take cache blocks last: none of them is worth another request's.
        rows = tuple(
            _plan_row(state, self._fit(state, num_tokens), windows[state.request_id], blocks.get(state.request_id))
            for state, num_tokens in granted
        )
        vacated, self._vacated = self._vacated, []
        return StepPlan(rows=rows, admissions=tuple(admissions), vacated=tuple(vacated))

    def schedule_ahead(self, plan: StepPlan) -> StepPlan | None:
        """Plan the step behind one that is being computed, whose plan this is; None where that takes its result.

        It does not where every request gets one token from this step and goes on with that token alone. A request that
        turns out to end with this step is then computed once in vain: `commit` drops its row. Its blocks may be
        another's by then; what that one writes comes later on the device, which computes steps in the order of their
        launch, and a block is not registered before all of its tokens are accepted, so the row in vain writes to none
        that is. Until a step planned here is committed, `schedule` must not be called.
        """
        running = [row for row in plan.rows if self._state_of(row) is not None]
        if not running or not self._can_plan_ahead(plan):
            return None
        rows = []
        for row, state in zip(running, self._running, strict=True):
            self._fit(state, 2)
            rows.append(replace(row, first_position=row.end_position, block_ids=tuple(state.block_ids)))
        return StepPlan(rows=tuple(rows))

    def shrink_steps(self, plan: StepPlan) -> None:
        """Make the next steps smaller than this one, which ran out of memory and is to be planned again.

        Each step that is computed lets them grow by a sixteenth. Where none could be smaller, the youngest request
        ends.
        """
        smallest = len(self._running)
        if plan.num_tokens > smallest:
            self._step_limit = max(smallest, plan.num_tokens // 2)
        elif self._running:
            state = self._running[-1]
            self._remove(state)
            self._ended.append(_error_output(state, "the memory of the device did not suffice for a step", "failed"))

    def without_ended(self, plan: StepPlan, result: StepResult) -> tuple[StepPlan, StepResult]:
        """The same without the rows of requests that ended or were aborted since the plan was made."""
        kept = [pair for pair in zip(plan.rows, result.rows, strict=True) if self._state_of(pair[0]) is not None]
        return replace(plan, rows=tuple(row for row, _ in kept)), StepResult(tuple(found for _, found in kept))

    def commit(self, plan: StepPlan, result: StepResult) -> list[RequestOutput]:
        """Book the result of a plan: advance, finish and free requests. Reports aborted ones too."""
        if plan.rows:
            self._step_limit = min(self._step_limit + -(-self._step_limit // 16), self.max_batched_tokens)
        outputs, self._ended = self._ended, []
        for row, row_result in zip(plan.rows, result.rows, strict=True):
            state = self._state_of(row)
            if state is None:
                continue
            state.prompt_logprobs += row_result.prompt_logprobs
            if row.num_sampled == 0:
                state.num_computed = row.end_position
                self._register_full_blocks(state)
                continue
            if not row_result.is_finite:
                outputs.append(self._end_not_finite(state))
                continue
            output = self._commit_window(state, row, row_result)
            self._register_full_blocks(state)
            if output.finish_reason is not None:
                self._remove(state)
            outputs.append(output)
        return outputs

    def take_broken_blocks(self) -> list[int]:
        """Blocks to be cleared before the next step, as they may hold values that are not finite."""
        taken, self._broken_blocks = self._broken_blocks, []
        return taken

    def check(self) -> None:
        """Raise BlockPoolCorrupted unless every block is held exactly by the requests that run."""
        self.block_pool.check(state.block_ids for state in self._by_id.values())

    def _state_of(self, row: PlannedRow) -> RequestState | None:
        """Of a planned row's request; None where it has ended since, even if another has its id by now."""
        state = self._by_id.get(row.request_id)
        return state if state is not None and state.slot == row.slot else None

    def _can_plan_ahead(self, plan: StepPlan) -> bool:
        """Whether the step behind this plan has its running rows, one token further, whatever tokens come.

        There must be blocks for both: the token that this step computes and the one that it chooses.
        """
        if self._waiting and self._free_slots:
            return False
        if any(row.num_tokens > 1 or row.num_sampled == 0 or row.gated is not None for row in plan.rows):
            return False
        if any(state.needs_text or len(state.output_ids) + 1 >= state.max_tokens for state in self._running):
            return False
        pool = self.block_pool
        missing = (pool.num_needed(state.num_computed + 2) - len(state.block_ids) for state in self._running)
        return sum(max(0, count) for count in missing) <= pool.num_free and self._windows_stay_single()

    def _windows_stay_single(self) -> bool:
        """Whether the next windows are of one token: such windows teach nothing that could change the choice."""
        if any(state.is_gated for state in self._running):
            return False
        if all(state.max_window == 1 for state in self._running):
            return True
        # A choice that explores counts as made, so that it is left to the step that can follow it.
        if self._draft_lengths is not None and self._draft_lengths.explores_next:
            return False
        return all(window == 1 for window in self._choose_windows(self.max_batched_tokens).values())

    @property
    def _has_prompt(self) -> bool:
        """Whether a prompt is being read, or could be."""
        return bool(self._waiting and self._free_slots) or any(state.num_pending > 1 for state in self._running)

    def _max_step_tokens(self) -> int:
        """Token budget of the next step: less than the most where a prompt chunk would hold up streams for too long.

        The chunk gets at least a block, and as much time as the step takes without it, so that prompts advance on slow
        machines as well.
        """
        num_rows, times = len(self._running), self._step_times
        if times is None or not self._has_prompt or not any(state.num_pending == 1 for state in self._running):
            return self._step_limit
        seconds = max(self._prefill_step_seconds, 2 * times.seconds(num_rows))
        fitting = max(times.num_tokens_within(seconds), num_rows + self.block_pool.block_size)
        return min(fitting, self._step_limit)

    def _choose_windows(self, max_tokens: int) -> dict[str, int]:
        """Window length of every request that runs, or may be admitted, for when its prompt is read.

        Args:
            max_tokens: budget of the step. While a prompt is being read, or could be, windows leave half of it to that,
                so that many long windows cannot starve the requests that have yet to start.
        """
        newcomers = list(islice(self._waiting, len(self._free_slots)))
        longest = {state.request_id: self._longest_window(state) for state in (*self._running, *newcomers)}
        budget = max(max_tokens // 2 if self._has_prompt else max_tokens, len(longest))
        if self._draft_lengths is not None:
            # What a gated adapter proposed is there to be verified: its depth was chosen when it was computed.
            fixed = {state.request_id: max(state.num_forced, state.num_proposed) for state in self._running}
            return self._draft_lengths.choose(
                longest, budget, {request_id: count for request_id, count in fixed.items() if count}
            )
        share = budget // max(1, sum(state.num_pending == 1 for state in self._running))
        return {request_id: min(window, share) for request_id, window in longest.items()}

    def _longest_window(self, state: RequestState) -> int:
        if self._gated_lengths is None or not state.is_gated:
            return state.max_window
        return self._gated_lengths.longest_window(state.num_proposed, state.max_window)

    def _choose_blocks(self, windows: Mapping[str, int], max_tokens: int) -> dict[str, GatedBlocks]:
        """Gated blocks behind the windows of requests whose known tokens are all computed by this step."""
        if self._gated_lengths is None:
            return {}
        newcomers = islice(self._waiting, len(self._free_slots))
        rows = [
            GatedRow(
                request_id=state.request_id,
                window=windows[state.request_id],
                num_proposed=state.num_proposed,
                num_left=state.max_tokens - len(state.output_ids),
            )
            for state in (*self._running, *newcomers)
            if state.is_gated and state.block_length > 1
        ]
        budget = max_tokens // 2 if self._has_prompt else max_tokens
        return self._gated_lengths.choose(rows, num_tokens=sum(windows.values()), max_tokens=budget) if rows else {}

    def _make_room(self, state: RequestState, num_known: int) -> tuple[bool, int]:
        """Get blocks for known tokens of a running request, for the first at least by preempting younger requests.

        Returns:
            Whether there is room (else the request itself was preempted), and the number of requests preempted.
        """
        num_preempted = 0
        while self._fit(state, num_known) == 0:
            victim = self._running[-1]
            self._preempt(victim)
            num_preempted += 1
            if victim is state:
                return False, num_preempted
        return True, num_preempted

    def _fit(self, state: RequestState, wanted: int) -> int:
        """Extend a request's blocks towards `wanted` more tokens, as far as free ones go; returns how many fit."""
        pool = self.block_pool
        num_missing = pool.num_needed(state.num_computed + wanted) - len(state.block_ids)
        state.block_ids += pool.allocate(max(0, min(num_missing, pool.num_free)))
        return min(wanted, len(state.block_ids) * pool.block_size - state.num_computed)

    def _admit(
        self,
        budget: "_TokenBudget",
        windows: Mapping[str, int],
        blocks: Mapping[str, GatedBlocks],
        granted: list[tuple[RequestState, int]],
    ) -> Iterator[Admission]:
        computing: dict[BlockHash, int] = {}
        if self._waiting and self._free_slots:
            for state, num_tokens in granted:
                computing |= self._blocks_filled(state, num_tokens)
        while self._waiting and self._free_slots and budget.remaining > 0:
            state = self._waiting.first
            if not self._reserve_known_tokens(state, computing):
                return
            self._waiting.pop()
            if state.admitted_at is None:
                state.admitted_at = self._clock()
            state.slot = self._free_slots.pop()
            self._running.append(state)
            num_tokens = min(budget.remaining, _num_wanted(state, windows, blocks))
            granted.append((state, num_tokens))
            computing |= self._blocks_filled(state, num_tokens)
            budget.spend(num_tokens)
            yield Admission(
                slot=state.slot,
                request=state.request,
                seed=state.seed,
                token_ids=state.token_ids(),
                block_length=state.block_length,
                stop_token_ids=tuple(sorted(state.stop_token_ids)),
                constraint=state.constraint,
            )

    def _blocks_filled(self, state: RequestState, num_tokens: int) -> dict[BlockHash, int]:
        """The blocks, by hash, that a row of `num_tokens` fills with known tokens in this step."""
        pool = self.block_pool
        if not pool.prefix_caching:
            return {}
        end = min(state.num_computed + num_tokens, state.num_tokens)
        first = state.num_computed // pool.block_size
        hashes = state.full_block_hashes(pool.block_size, end)[first:]
        return dict(zip(hashes, state.block_ids[first:], strict=False))

    def _reserve_known_tokens(self, state: RequestState, computing: Mapping[BlockHash, int]) -> bool:
        """Take blocks for all known tokens of a waiting request; False where they do not fit.

        Blocks with an equal prefix come first: cached ones, then those that other rows of this step fill. A layer
        stores the keys and values of all rows before any row attends, so both serve alike.

        Args:
            state: of the request.
            computing: blocks that rows planned so far fill in this step, by hash.
        """
        pool = self.block_pool
        # At least one token must be computed, else there is nothing to predict from.
        hashes = state.full_block_hashes(pool.block_size, state.num_shareable) if pool.prefix_caching else []
        matched = pool.match_prefix(hashes)
        shared = [computing[h] for h in takewhile(computing.__contains__, hashes[len(matched) :])]
        pool.share(shared)
        matched += shared
        num_missing = pool.num_needed(state.num_tokens) - len(matched)
        if num_missing > pool.num_free:
            pool.free(matched)
            return False
        state.block_ids = matched + pool.allocate(num_missing)
        state.num_registered = len(matched) - len(shared)
        state.num_computed = len(matched) * pool.block_size
        if not state.num_preemptions:  # else it may find its own blocks
            state.num_cached = state.num_computed
        return True

    def _preempt(self, state: RequestState) -> None:
        """Take a request's slot and blocks; once there is room, what the prefix cache lost is computed again."""
        self._release(state)
        state.num_computed = state.num_proposed = 0
        state.num_preemptions += 1
        self._waiting.add_first(state)

    def _release(self, state: RequestState) -> None:
        if state.slot is not None:
            self._running.remove(state)
            self._free_slots.append(state.slot)
            self._vacated.append(state.slot)
            state.slot = None
        self.block_pool.free(state.block_ids)
        state.block_ids = []

    def _remove(self, state: RequestState) -> None:
        if state.slot is None:
            self._waiting.remove(state)
        self._release(state)
        del self._by_id[state.request_id]
        if self._draft_lengths is not None:
            self._draft_lengths.forget(state.request_id)
        if self._gated_lengths is not None:
            self._gated_lengths.forget(state.request_id)

    def _commit_window(self, state: RequestState, row: PlannedRow, result: RowResult) -> RequestOutput:
        num_forced, is_first = state.num_forced, state.num_forward_passes == 0
        num_taken, finish_reason = state.accept(result.accepted_ids)
        # The last accepted token of the row is final, and so is every draft token that was confirmed.
        state.num_computed = row.last_accepted_position + num_taken
        state.num_forward_passes += num_taken > 0
        state.num_proposed = result.num_proposed
        self._learn(state, row, result, num_forced)
        if state.first_token_at is None and num_taken:
            state.first_token_at = self._clock()
        token_ids = result.accepted_ids[:num_taken]
        return RequestOutput(
            request_id=state.request_id,
            token_ids=token_ids,
            logprobs=None if result.logprobs is None else result.logprobs[:num_taken],
            prompt_logprobs=_prompt_logprobs(state) if is_first else None,
            finish_reason=finish_reason,
            stop_token_id=token_ids[-1] if finish_reason == "stop" else None,
            error=state.error if finish_reason == "error" else None,
            error_code="failed" if finish_reason == "error" else None,
            draft_ids=_reported_draft(state, result) if finish_reason is None else (),
            times=None if finish_reason is None else state.times(self._clock()),
            stats=state.stats,
        )

    def _end_not_finite(self, state: RequestState) -> RequestOutput:
        """End a request whose logits were not finite; its blocks must not reach another with what is in them."""
        block_ids = state.block_ids
        self._remove(state)
        self._broken_blocks += self.block_pool.forget(block_ids)
        return _error_output(state, "the model computed values that are not finite for this request", "failed")

    def _learn(self, state: RequestState, row: PlannedRow, result: RowResult, num_forced: int) -> None:
        """Let the choices of lengths see what became of a window."""
        if self._gated_lengths is not None and state.is_gated:
            self._gated_lengths.observe_window(
                state.request_id, row.num_sampled, result.num_accepted - 1, result.num_gated
            )
        if self._draft_lengths is not None and not result.num_gated:
            self._draft_lengths.observe_window(
                state.request_id,
                row.num_sampled,
                result.num_accepted - 1,
                block_length=state.block_length,
                num_forced=num_forced,
            )

    def _register_full_blocks(self, state: RequestState) -> None:
        if not self.block_pool.prefix_caching:
            return
        hashes = state.full_block_hashes(self.block_pool.block_size, state.num_computed)
        for index in range(state.num_registered, len(hashes)):
            self.block_pool.register(state.block_ids[index], hashes[index])
        state.num_registered = max(state.num_registered, len(hashes))


def _num_wanted(state: RequestState, windows: Mapping[str, int], blocks: Mapping[str, GatedBlocks]) -> int:
    """Tokens that a request should compute: what it has to read, the last of which begins its window; gated blocks."""
    own = blocks.get(state.request_id)
    return state.num_pending + windows[state.request_id] - 1 + (0 if own is None else own.num_tokens)


class _TokenBudget:
    """Shares one step's tokens over the running requests, each of which gets at least one.

    Args:
        max_tokens: of the step; at least num_running.
        num_running: requests to serve.
        wanted: request id -> tokens it should compute, of every running request.
    """

    def __init__(self, max_tokens: int, num_running: int, wanted: dict[str, int]) -> None:
        self.remaining = max_tokens
        self._num_owed = num_running
        self._wanted = wanted

    def grant(self, state: RequestState) -> int:
        """Tokens this running request may compute now; at least 1."""
        self._num_owed -= 1
        return min(self.remaining - self._num_owed, self._wanted[state.request_id])

    def spend(self, num_tokens: int) -> None:
        """Book tokens that were planned."""
        self.remaining -= num_tokens


def _reported_draft(state: RequestState, result: RowResult) -> tuple[int, ...]:
    """The window's unaccepted predictions, if the client wants them; what follows an end is never shown."""
    if not state.request.wants_draft:
        return ()
    return tuple(takewhile(lambda token_id: token_id not in state.stop_token_ids, result.unaccepted_ids))


def _prompt_logprobs(state: RequestState) -> tuple[TokenLogprobs, ...] | None:
    return None if state.request.params.prompt_logprobs is None else tuple(state.prompt_logprobs)


def _error_output(state: RequestState, error: str, code: ErrorCode) -> RequestOutput:
    return RequestOutput(
        request_id=state.request_id, finish_reason="error", error=error, error_code=code, stats=state.stats
    )


def _plan_row(state: RequestState, num_granted: int, window: int, blocks: GatedBlocks | None) -> PlannedRow:
    """The row of a request that may compute so many tokens: known ones and its window first, then gated blocks."""
    assert state.slot is not None
    num_tokens = min(num_granted, state.num_pending + window - 1)
    num_sampled = max(0, num_tokens - state.num_pending + 1)
    return PlannedRow(
        request_id=state.request_id,
        slot=state.slot,
        first_position=state.num_computed,
        num_tokens=num_tokens,
        num_sampled=num_sampled,
        block_ids=tuple(state.block_ids),
        adapter_id=state.adapter_id,
        scored_positions=state.positions_to_score(state.num_computed, state.num_computed + num_tokens),
        gated=None if blocks is None else blocks.within(num_granted - num_tokens),
    )
