"""How noisy blocks are chosen."""

import random

import pytest

from cllm_core.errors import ConfigError
from cllm_core.training.config import NoiseConfig, Schedule
from cllm_core.training.examples import DraftState, NoisyBlock, Trajectory, global_block
from cllm_core.training.noise import apply_schedule, choose_blocks, random_draft
from tests.training.factories import random_ids

RNG = random.Random(0)
PROMPT, ANSWER = random_ids(RNG, 6), random_ids(RNG, 30)
WRONG = 2  # a special token, in no answer
STATES = tuple(DraftState(i, (WRONG,) * 7) for i in range(29))
RECORDED = Trajectory(PROMPT, ANSWER, STATES)
UNRECORDED = Trajectory(PROMPT, ANSWER)


@pytest.mark.parametrize("trajectory", [RECORDED, UNRECORDED])
@pytest.mark.parametrize("consistency", ["global", "local"])
def test_blocks_begin_wrong_and_lie_within_the_answer(trajectory: Trajectory, consistency: str) -> None:
    noise = NoiseConfig(block_length=8, blocks_per_example=5, consistency=consistency)  # type: ignore[arg-type]
    for seed in range(50):
        for block in choose_blocks(trajectory, noise, random.Random(seed)):
            assert block.draft_ids[0] != ANSWER[block.start]
            assert 1 <= len(block.draft_ids) == len(block.target_ids) <= 7
            assert block.start + 1 + len(block.draft_ids) <= len(ANSWER)


def test_same_generator_state_gives_same_blocks() -> None:
    noise = NoiseConfig(synthetic_ratio=0.5, corrected_ratio=0.3)
    assert choose_blocks(RECORDED, noise, random.Random(7)) == choose_blocks(RECORDED, noise, random.Random(7))


def test_states_are_spread_over_the_answer() -> None:
    noise = NoiseConfig(block_length=8, blocks_per_example=4)
    starts = [block.start for block in choose_blocks(RECORDED, noise, random.Random(1))]
    assert [start * 4 // len(STATES) for start in starts] == [0, 1, 2, 3]


def test_recorded_states_are_taken_unless_made_up_ones_are_asked_for() -> None:
    recorded = choose_blocks(RECORDED, NoiseConfig(block_length=8), random.Random(1))
    made_up = choose_blocks(RECORDED, NoiseConfig(block_length=8, synthetic_ratio=1.0), random.Random(1))
    assert all(set(block.draft_ids) == {WRONG} for block in recorded)
    assert all(WRONG not in block.draft_ids for block in made_up)


def test_corrected_states_have_right_tokens_behind_wrong_ones() -> None:
    noise = NoiseConfig(block_length=8, blocks_per_example=8, corrected_ratio=0.5)
    blocks = choose_blocks(RECORDED, noise, random.Random(1))
    tokens = [(token, ANSWER[block.start + i]) for block in blocks for i, token in enumerate(block.draft_ids) if i > 0]
    share = sum(token == right for token, right in tokens) / len(tokens)
    assert 0.3 < share < 0.7


def test_random_drafts_use_tokens_of_prompt_and_answer_alone() -> None:
    known = set(PROMPT) | set(ANSWER)
    for seed in range(30):
        assert set(random_draft(UNRECORDED, seed % 20, 7, random.Random(seed))) <= known


@pytest.mark.parametrize(
    ("schedule", "progress", "lengths"),
    [
        ("constant", 0.0, [7, 7, 7, 7]),
        ("growing", 0.0, [1, 1, 1, 1]),
        ("growing", 0.25, [4, 4, 4, 4]),
        ("growing", 0.9, [7, 7, 7, 7]),
        ("cyclic", 0.0, [2, 4, 6, 7]),
    ],
)
def test_schedules_shorten_blocks(schedule: Schedule, progress: float, lengths: list[int]) -> None:
    noise = NoiseConfig(block_length=8, schedule=schedule)
    blocks = [NoisyBlock(0, tuple(range(7)), tuple(range(7)))] * 4
    assert [len(block.draft_ids) for block in apply_schedule(blocks, noise, progress=progress)] == lengths


def test_answers_of_one_token_and_no_blocks_wanted_give_none() -> None:
    assert choose_blocks(Trajectory(PROMPT, (5,)), NoiseConfig(), random.Random(0)) == ()
    assert choose_blocks(RECORDED, NoiseConfig(blocks_per_example=0), random.Random(0)) == ()
    assert global_block((5,), DraftState(0, (6, 7))) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"block_length": 0},
        {"block_length": 1},
        {"synthetic_ratio": 1.5},
        {"growing_until": 0.0},
        {"blocks_per_example": -1},
    ],
)
def test_wrong_settings_are_named(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        NoiseConfig(**wrong)  # type: ignore[arg-type]
