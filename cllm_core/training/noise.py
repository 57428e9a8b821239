"""Which noisy blocks an example is trained on: recorded states of its trajectory, or drafts made up at random.

Everything is drawn from the generator that the caller gives, so that an interrupted run sees the same noise again.
"""

import math
import random
from collections.abc import Sequence

from cllm_core.training.config import NoiseConfig
from cllm_core.training.examples import DraftState, NoisyBlock, Trajectory, global_block, local_block

_MAX_SHIFT = 3  # of tokens that stand at a wrong place, as they do in the states of real trajectories


def choose_blocks(trajectory: Trajectory, config: NoiseConfig, rng: random.Random) -> tuple[NoisyBlock, ...]:
    """The noisy blocks of an example for one epoch, at most `blocks_per_example`, ordered by their place."""
    num_wanted = config.blocks_per_example
    num_places = len(trajectory.output_ids) - 1  # a draft at the last token would have nothing to predict
    if num_places < 1 or not num_wanted:
        return ()
    blocks = []
    for index in range(num_wanted):
        if not trajectory.states or rng.random() < config.synthetic_ratio:
            block = _made_up(trajectory, pick(num_places, index, num_wanted, rng), config, rng)
        else:
            block = _recorded(trajectory, pick(len(trajectory.states), index, num_wanted, rng), config, rng)
        if block is not None:
            blocks.append(block)
    return tuple(blocks)


def apply_schedule(blocks: Sequence[NoisyBlock], config: NoiseConfig, *, progress: float) -> tuple[NoisyBlock, ...]:
    """Shorten blocks as the schedule says.

    Args:
        blocks: of one example, from `choose_blocks`.
        config: names the schedule.
        progress: of the training, 0..1.
    """
    return tuple(
        _shortened(block, _longest_draft(config, index, len(blocks), progress)) for index, block in enumerate(blocks)
    )


def random_draft(trajectory: Trajectory, start: int, length: int, rng: random.Random) -> tuple[int, ...]:
    """A draft like those of early iterations: tokens of the answer, of places nearby, repeated ones, prompt tokens.

    Args:
        trajectory: whose answer is drafted.
        start: output index of the first token, which is not taken from the answer.
        length: in tokens.
        rng: decides first how wrong the draft is, then each token.
    """
    output_ids = trajectory.output_ids
    wrong_ratio = rng.random()
    draft: list[int] = []
    for index in range(start, start + length):
        if index > start and index < len(output_ids) and rng.random() > wrong_ratio:
            draft.append(output_ids[index])
        else:
            draft.append(_wrong_token(trajectory, index, draft, rng))
    return tuple(draft)


def _wrong_token(trajectory: Trajectory, index: int, draft: list[int], rng: random.Random) -> int:
    output_ids = trajectory.output_ids
    match rng.randrange(3):
        case 0 if draft:
            return draft[-1]
        case 1:
            shift = rng.choice((-1, 1)) * rng.randint(1, _MAX_SHIFT)
            return output_ids[min(max(index + shift, 0), len(output_ids) - 1)]
    return rng.choice(trajectory.prompt_ids)


def _made_up(trajectory: Trajectory, start: int, config: NoiseConfig, rng: random.Random) -> NoisyBlock | None:
    length = min(config.block_length - 1, len(trajectory.output_ids) - 1 - start)
    return global_block(trajectory.output_ids, DraftState(start, random_draft(trajectory, start, length, rng)))


def _recorded(trajectory: Trajectory, index: int, config: NoiseConfig, rng: random.Random) -> NoisyBlock | None:
    state = _corrected(trajectory, trajectory.states[index], config.corrected_ratio, rng)
    if config.consistency == "local":
        following = trajectory.states[index + 1] if index + 1 < len(trajectory.states) else None
        block = local_block(trajectory.output_ids, state, following)
    else:
        block = global_block(trajectory.output_ids, state)
    return block and _shortened(block, config.block_length - 1)


def _corrected(trajectory: Trajectory, state: DraftState, ratio: float, rng: random.Random) -> DraftState:
    if not ratio:
        return state
    right = trajectory.output_ids[state.num_accepted :]
    draft = [
        right[i] if i < len(right) and rng.random() < ratio else token_id for i, token_id in enumerate(state.draft_ids)
    ]
    return DraftState(state.num_accepted, tuple(draft), state.unaccepted_ids)


def pick(num_choices: int, index: int, num_picks: int, rng: random.Random) -> int:
    """One of `num_choices`, out of the index-th of `num_picks` equal parts."""
    return min(int(num_choices * (index + rng.random()) / num_picks), num_choices - 1)


def _shortened(block: NoisyBlock, longest: int) -> NoisyBlock:
    if len(block.draft_ids) <= longest:
        return block
    return NoisyBlock(block.start, block.draft_ids[:longest], block.target_ids[:longest])


def _longest_draft(config: NoiseConfig, index: int, num_blocks: int, progress: float) -> int:
    full = config.block_length - 1
    match config.schedule:
        case "constant":
            return full
        case "growing":
            return max(1, math.ceil(full * min(1.0, progress / config.growing_until)))
        case "cyclic":
            return max(1, math.ceil(full * (index + 1) / num_blocks))
