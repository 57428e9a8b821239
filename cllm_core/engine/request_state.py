"""RequestState: what the Scheduler knows of one request between steps. Host only, no tensors."""

from dataclasses import dataclass, field

from cllm_core.engine.block_pool import BlockHash, chain_hash, root_hash
from cllm_core.engine.constraint import Constraint
from cllm_core.request import DecodingStats, FinishReason, NewRequest, RequestTimes, TokenLogprobs


@dataclass(slots=True, kw_only=True, eq=False)  # removing one from a list must not compare texts
class RequestState:
    """A request and its progress. `num_computed` is all there is to rollback: slots past it are written again.

    Attributes:
        seed: of the sampling noise.
        block_length: Jacobi block length n, in tokens.
        max_tokens: output limit in tokens, resolved to the context's end where the client gave none.
        stop_token_ids: tokens that end the output (end-of-sequence included unless ignored).
        constraint: what the request's grammar says of the output, None where it has none.
        adapter_id: that rows name the request's adapter by; 0 is none.
        adapter_key: prefixes are shared only where it is equal.
        is_gated: whether a gated adapter proposes for it.
        num_proposed: tokens that it proposes for the next window.
        num_computed: tokens from the start of the prompt whose keys and values are in the cache and final.
        block_ids: cache blocks held, in the order of the text.
        num_registered: leading blocks of block_ids that the pool can find by hash.
        prompt_logprobs: of the prompt tokens from the second on, as far as known; empty where they are not wanted.
        queued_at: when the request was queued, in seconds of the scheduler's clock.
        admitted_at: when it was first admitted, None before.
        first_token_at: when its first token came, None before.
        slot: index in the runner's per-request tensors; None while waiting.
    """

    request: NewRequest
    seed: int
    block_length: int
    max_tokens: int
    stop_token_ids: frozenset[int]
    constraint: Constraint | None = None
    adapter_id: int = 0
    adapter_key: str = ""
    is_gated: bool = False
    num_proposed: int = 0
    output_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[BlockHash] = field(default_factory=list)
    num_registered: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    slot: int | None = None
    num_cached: int = 0
    num_forward_passes: int = 0
    num_preemptions: int = 0
    queued_at: float = 0.0
    admitted_at: float | None = None
    first_token_at: float | None = None

    @property
    def request_id(self) -> str:
        """Of the request."""
        return self.request.request_id

    @property
    def num_tokens(self) -> int:
        """Prompt and accepted output, in tokens."""
        return len(self.request.prompt_ids) + len(self.output_ids)

    @property
    def num_pending(self) -> int:
        """Known tokens not computed yet: the rest of the prompt, or 1, the last accepted token."""
        return self.num_tokens - self.num_computed

    @property
    def max_window(self) -> int:
        """Longest useful Jacobi window: more predictions than output tokens still wanted would be thrown away."""
        return max(1, min(self.block_length, self.max_tokens - len(self.output_ids)))

    @property
    def needs_text(self) -> bool:
        """Whether the next token cannot be chosen before the host knows the one before it."""
        return self.constraint is not None or self.request.params.has_penalties

    @property
    def num_shareable(self) -> int:
        """Leading tokens that need not be computed: all but the last, or those scored while the prompt is not whole."""
        if self.request.params.prompt_logprobs is None or len(self.prompt_logprobs) == len(self.request.prompt_ids) - 1:
            return self.num_tokens - 1
        return len(self.prompt_logprobs)

    @property
    def num_forced(self) -> int:
        """Tokens at the head of the next draft that are no guess: the grammar leaves no other text."""
        return 0 if self.constraint is None else len(self.constraint.forced_ids)

    def times(self, now: float) -> RequestTimes | None:
        """Where the time went up to now; None before the first token."""
        if self.admitted_at is None or self.first_token_at is None:
            return None
        return RequestTimes(
            queue=self.admitted_at - self.queued_at,
            prefill=self.first_token_at - self.admitted_at,
            decode=now - self.first_token_at,
        )

    @property
    def error(self) -> str | None:
        """Why the output cannot go on, None while it can."""
        return None if self.constraint is None else self.constraint.error

    @property
    def stats(self) -> DecodingStats:
        """For the client."""
        return DecodingStats(
            num_prompt_tokens=len(self.request.prompt_ids),
            num_cached_tokens=self.num_cached,
            num_output_tokens=len(self.output_ids),
            num_forward_passes=self.num_forward_passes,
            num_preemptions=self.num_preemptions,
        )

    def token_ids(self) -> tuple[int, ...]:
        """Prompt and accepted output."""
        return (*self.request.prompt_ids, *self.output_ids)

    def positions_to_score(self, start: int, end: int) -> range:
        """Those of start..end - 1 whose successor's log-probability is wanted and not known yet."""
        if self.request.params.prompt_logprobs is None:
            return range(0)
        return range(max(start, len(self.prompt_logprobs)), min(end, len(self.request.prompt_ids) - 1))

    def tokens_between(self, start: int, end: int) -> list[int]:
        """Accepted tokens at positions start..end - 1."""
        prompt_ids = self.request.prompt_ids
        num_prompt = len(prompt_ids)
        head = list(prompt_ids[start:end]) if start < num_prompt else []
        return head + self.output_ids[max(0, start - num_prompt) : max(0, end - num_prompt)]

    def full_block_hashes(self, block_size: int, num_tokens: int) -> list[BlockHash]:
        """Hashes of the blocks that the first `num_tokens` accepted tokens fill; extends the memo."""
        num_full = num_tokens // block_size
        while len(self.block_hashes) < num_full:
            start = len(self.block_hashes) * block_size
            parent = self.block_hashes[-1] if self.block_hashes else self._root_hash()
            self.block_hashes.append(chain_hash(parent, self.tokens_between(start, start + block_size)))
        return self.block_hashes[:num_full]

    def _root_hash(self) -> BlockHash:
        return root_hash(cache_salt=self.request.cache_salt, adapter=self.adapter_key)

    def accept(self, token_ids: tuple[int, ...]) -> tuple[int, FinishReason | None]:
        """Append accepted tokens up to the first that ends the output.

        Returns:
            How many were taken (at least 1, none with "error" or max_tokens 0), and the finish reason or None.
        """
        if self.max_tokens == 0:
            return 0, "length"
        if self.constraint is None:
            return self._append(token_ids)
        if self.constraint.error is not None:
            return 0, "error"
        num_taken, finish_reason = self._append(self.constraint.clip(token_ids))
        self.constraint.accept(token_ids[:num_taken])
        return num_taken, finish_reason

    def _append(self, token_ids: tuple[int, ...]) -> tuple[int, FinishReason | None]:
        for count, token_id in enumerate(token_ids, start=1):
            self.output_ids.append(token_id)
            if token_id in self.stop_token_ids:
                return count, "stop"
            if len(self.output_ids) >= self.max_tokens:
                return count, "length"
        return len(token_ids), None
