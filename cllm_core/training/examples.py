"""What is trained on: a prompt, its answer, and drafts that lead to the answer. Plain values; no torch in here.

Positions of drafts are counted in the answer ("output indices"): 0 is the first token after the prompt. ::

    output index     0   1   2   3   4   5          answer y0..y5 = fixed point; y5 ends the sequence
    state (2, d)             d0  d1  d2             2 tokens accepted, the model sees y0 y1 d0 d1 d2
    its block (3, ..)            d1  d2             where d0 == y2: a token that is right is a clean one
    targets                          y4  y5         d1 at index 3 has to predict y4, d2 at 4 has to predict y5
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec


class DraftState(msgspec.Struct, frozen=True, array_like=True):
    """One state of a Jacobi trajectory.

    Attributes:
        num_accepted: output tokens accepted before this iteration; output index of draft_ids[0].
        draft_ids: the n - 1 guesses after them.
        unaccepted_ids: what the model predicted from here behind the tokens that this iteration accepted, up to output
            index num_accepted + n - 1; the next draft may be another one, copied from the text. None where it was not
            recorded, as in folders of earlier versions.
    """

    num_accepted: int
    draft_ids: tuple[int, ...]
    unaccepted_ids: tuple[int, ...] | None = None


class Trajectory(msgspec.Struct, frozen=True):
    """A prompt, the answer that Jacobi decoding converges to, and the states on its way.

    Attributes:
        prompt_ids: at least one token.
        output_ids: the answer; its last token ends the sequence where it is finished.
        states: in the order they were passed; empty where only the answer is known.
        finished: whether the answer ended by itself, not at a limit.
    """

    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    states: tuple[DraftState, ...] = ()
    finished: bool = True


@dataclass(frozen=True, slots=True)
class NoisyBlock:
    """A draft as the loss sees it: from its first wrong token on, up to the last one with a token to predict.

    Attributes:
        start: output index of draft_ids[0]; the block sees the clean answer before it.
        draft_ids: at least one; the first is wrong.
        target_ids: what each of them has to predict: the token at output index start + 1 + i.
    """

    start: int
    draft_ids: tuple[int, ...]
    target_ids: tuple[int, ...]


def global_block(output_ids: Sequence[int], state: DraftState) -> NoisyBlock | None:
    """The block whose targets are the fixed point (global consistency); None where nothing is left to learn.

    Tokens before the first wrong one are dropped: they equal the clean answer, and what is predicted after them is the
    AR prediction. Tokens whose prediction would lie behind the end of the answer are dropped too.
    """
    start = state.num_accepted
    draft = state.draft_ids
    num_right = 0
    while num_right < len(draft) and start < len(output_ids) and draft[num_right] == output_ids[start]:
        num_right += 1
        start += 1
    num_left = len(output_ids) - 1 - start
    kept = tuple(draft[num_right : num_right + max(num_left, 0)])
    if not kept:
        return None
    return NoisyBlock(start, kept, tuple(output_ids[start + 1 : start + 1 + len(kept)]))


def local_block(output_ids: Sequence[int], state: DraftState, following: DraftState | None) -> NoisyBlock | None:
    """The block whose targets are what one Jacobi iteration makes of the state (local consistency).

    Args:
        output_ids: the fixed point.
        state: the state to start from.
        following: the state after it, whose draft stands in for predictions that were not recorded, though it may be
            copied from the text; None where the fixed point is next, which makes this the global block.
    """
    block = global_block(output_ids, state)
    if block is None:
        return None
    if state.unaccepted_ids is not None:
        next_ids, end = state.unaccepted_ids, state.num_accepted + len(state.draft_ids) + 1
        first = end - len(next_ids)
    elif following is not None:
        next_ids, first = following.draft_ids, following.num_accepted
        end = first + len(next_ids)
    else:
        return block
    indices = range(block.start + 1, min(block.start + 1 + len(block.draft_ids), end))
    targets = tuple(output_ids[i] if i < first else next_ids[i - first] for i in indices)
    return NoisyBlock(block.start, block.draft_ids[: len(targets)], targets) if targets else None
