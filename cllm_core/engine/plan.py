"""What Scheduler and ModelRunner tell each other, as frozen values."""

from dataclasses import dataclass, replace

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
class GatedBlocks:
    """Rows beside a window that only propose, computed with the gated adapter; the window's own rows never see them.

    A block stands behind a length that may be accepted of the draft. It sees the text and as much of the draft, and its
    rows propose what follows each of them: the next draft, should exactly that length be accepted.

    ::

        position            p    p+1  p+2  p+3       p = last accepted position
        window              x0   d1   d2
        block behind 0           g    g              proposes p+2, p+3
        block behind 1                g    g         sees d1, proposes p+3, p+4
    """

    adapter_id: int
    lengths: tuple[int, ...]  # draft tokens that each block takes for accepted, the likeliest first
    size: int  # rows of each block
    reads_draft: bool = False  # rows read what is drafted at their positions, as far as the draft goes; else noise

    @property
    def num_tokens(self) -> int:
        """Rows of all blocks."""
        return len(self.lengths) * self.size

    def within(self, num_tokens: int) -> "GatedBlocks | None":
        """As many of the likeliest blocks as have so many rows; None where none has."""
        lengths = self.lengths[: num_tokens // self.size]
        return replace(self, lengths=lengths) if lengths else None


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
    block_ids: tuple[int, ...]  # blocks with slots for positions 0..first_position + num_tokens - 1 and gated rows
    adapter_id: int = 0  # of the request's adapter, 0 is none
    scored_positions: range = range(0)  # prompt tokens of the row, the probability of whose successors is wanted
    gated: GatedBlocks | None = None  # beside the window; their cache slots follow its own

    @property
    def end_position(self) -> int:
        """Position after the last token to compute; also the length of the context it attends to."""
        return self.first_position + self.num_tokens

    @property
    def num_gated_tokens(self) -> int:
        """Rows of its gated blocks."""
        return 0 if self.gated is None else self.gated.num_tokens

    @property
    def last_accepted_position(self) -> int:
        """Position of the window's first token, the last accepted one. Needs num_sampled >= 1."""
        return self.end_position - self.num_sampled


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass: the rows, and the requests that got a slot since the last plan."""

    rows: tuple[PlannedRow, ...]
    admissions: tuple[Admission, ...] = ()
    vacated: tuple[int, ...] = ()  # slots that requests left since the last plan, before the admissions

    @property
    def num_tokens(self) -> int:
        """Tokens to compute, those of gated blocks included."""
        return sum(row.num_tokens + row.num_gated_tokens for row in self.rows)


@dataclass(frozen=True, slots=True)
class RowResult:
    """What one row of a plan yielded; but for prompt_logprobs empty where num_sampled was 0."""

    window_ids: tuple[int, ...] = ()  # n tokens: the last accepted one and the draft
    predicted_ids: tuple[int, ...] = ()  # n tokens: what follows each token of the window
    num_accepted: int = 0  # 1..n leading predictions that are final
    logprobs: tuple[TokenLogprobs, ...] | None = None  # one per accepted token where the request asked
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # of the tokens behind the row's scored positions
    num_gated: int = 0  # draft tokens at the head of the window that the gated adapter had proposed
    num_proposed: int = 0  # tokens that it proposes for the next window
    is_finite: bool = True  # whether all logits of the chosen tokens were; else nothing is accepted

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
