"""The packs of a whole training."""

import random

import pytest
import torch

from cllm_core.training.config import NoiseConfig
from cllm_core.training.dataset import PackDataset
from cllm_core.training.examples import Trajectory
from tests.training.factories import make_run, random_ids


def make_trajectories(count: int = 20) -> list[Trajectory]:
    rng = random.Random(0)
    shared = random_ids(rng, 10)
    return [Trajectory(shared + random_ids(rng, 3), random_ids(rng, 8)) for _ in range(count)]


def test_every_epoch_holds_every_example_once() -> None:
    packs = PackDataset(make_trajectories(), NoiseConfig(block_length=4), make_run(epochs=3.0))
    assert packs.num_examples() == 60
    assert sum(len(packs[i]["chunk_ends"]) for i in range(len(packs))) == 60


def test_part_of_an_epoch_is_part_of_its_packs() -> None:
    one = PackDataset(make_trajectories(), NoiseConfig(), make_run(epochs=1.0))
    half = PackDataset(make_trajectories(), NoiseConfig(), make_run(epochs=0.5))
    assert len(half) == (len(one) + 1) // 2


def test_pack_is_the_same_whenever_it_is_made() -> None:
    first, second = (PackDataset(make_trajectories(), NoiseConfig(), make_run()) for _ in range(2))
    index = len(first) - 1
    for name, value in first[index].items():
        assert torch.equal(value, second[index][name]), name


def test_noise_differs_between_epochs_and_seeds() -> None:
    packs = PackDataset(make_trajectories(1), NoiseConfig(block_length=4), make_run(epochs=2.0))
    other = PackDataset(make_trajectories(1), NoiseConfig(block_length=4), make_run(epochs=2.0, seed=1))
    texts = [tuple(dataset[i]["input_ids"].tolist()) for dataset in (packs, other) for i in range(2)]
    assert len(set(texts)) == 4


def test_growing_blocks_are_full_at_their_share_of_the_packs_that_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """They grew over the packs of all epochs, so that a run ended by max_steps never saw full ones."""
    noise = NoiseConfig(block_length=6, schedule="growing", growing_until=0.5)
    monkeypatch.setenv("WORLD_SIZE", "2")
    used = 8  # of the packs
    packs = PackDataset(make_trajectories(), noise, make_run(epochs=4.0, max_steps=2, packs_per_step=2))
    full = PackDataset(make_trajectories(), NoiseConfig(block_length=6), make_run(epochs=4.0))
    assert len(packs) > 2 * used
    assert len(packs[used // 4]["input_ids"]) < len(full[used // 4]["input_ids"])
    for index in (used // 2, used - 1, len(packs) - 1):
        assert torch.equal(packs[index]["input_ids"], full[index]["input_ids"])


def test_packs_keep_the_limit_with_their_noise() -> None:
    packs = PackDataset(make_trajectories(), NoiseConfig(block_length=6), make_run(pack_length=80))
    assert max(len(packs[i]["input_ids"]) for i in range(len(packs))) <= 80
