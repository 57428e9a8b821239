"""What Scheduler and ModelRunner tell each other, as frozen values."""

from dataclasses import dataclass

from cllm_core.engine.constraint import Constraint
from cllm_core.request import NewRequest, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Admission:
    """A request takes a slot of the runner, for the first time or again after a preemption."""

    slot: int  # 0..max_num_seqs - 1, until the request leaves
    request: NewRequest
    seed: int  # of the sampling noise, 64 bit
    token_ids: tuple[int, ...]  # prompt, then output accepted so far
    block_length: int  # n of the request, in tokens
    stop_token_ids: tuple[int, ...]  # tokens that end the output
    constraint: Constraint | None = None  # the request's own, shared with the scheduler; None where it has no grammar


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """Tokens of one request to compute in this step: a prompt chunk, a Jacobi window, or a chunk with the first window.

    ::

        position   first_position                 first_position + num_tokens
                   | prompt chunk ... | last accepted | draft ...  |
                                      |<------- num_sampled ------>|
    """

    request_id: str
    slot: int
    first_position: int  # of the first token to compute, in tokens from the start of the prompt
    num_tokens: int  # tokens to compute
    num_sampled: int  # n: trailing tokens whose prediction is wanted; 0 where the prompt goes on in a later step
    block_ids: tuple[int, ...]  # blocks that cover at least positions 0..first_position + num_tokens - 1
    adapter_id: int = 0  # of the request's adapter, 0 is none
    scored_positions: range = range(0)  # prompt tokens of the row, the probability of whose successors is wanted

    @property
    def end_position(self) -> int:
        """Position after the last token to compute; also the length of the context it attends to."""
        return self.first_position + self.num_tokens

    @property
    def last_accepted_position(self) -> int:
        """Position of the window's first token, the last accepted one. Needs num_sampled >= 1."""
        return self.end_position - self.num_sampled


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass: the rows, and the requests that got a slot since the last plan."""

    rows: tuple[PlannedRow, ...]
    admissions: tuple[Admission, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens to compute."""
        return sum(row.num_tokens for row in self.rows)


@dataclass(frozen=True, slots=True)
class RowResult:
    """What one row of a plan yielded; but for prompt_logprobs empty where num_sampled was 0."""

    window_ids: tuple[int, ...] = ()  # n tokens: the last accepted one and the draft
    predicted_ids: tuple[int, ...] = ()  # n tokens: what follows each token of the window
    num_accepted: int = 0  # 1..n leading predictions that are final
    logprobs: tuple[TokenLogprobs, ...] | None = None  # one per accepted token where the request asked
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # of the tokens behind the row's scored positions

    @property
    def accepted_ids(self) -> tuple[int, ...]:
        """The accepted tokens, 1..n."""
        return self.predicted_ids[: self.num_accepted]

    @property
    def unaccepted_ids(self) -> tuple[int, ...]:
        """The predictions behind them, 0..n - 1: the next draft begins with these."""
        return self.predicted_ids[self.num_accepted :]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step yielded, row for row in the order of the plan."""

    rows: tuple[RowResult, ...]
