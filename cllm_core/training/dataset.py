"""PackDataset: the whole training, all epochs in order, as a list of packs that are made when they are asked for.

What pack i holds depends on the settings and i alone, so a run that resumes at pack i goes on as if never interrupted.
"""

import math
import random
from collections.abc import Sequence

from torch import Tensor
from torch.utils.data import Dataset

from cllm_core.training.config import NoiseConfig, RunConfig
from cllm_core.training.examples import NoisyBlock, Trajectory
from cllm_core.training.gated import noise_blocks
from cllm_core.training.launch import world_size
from cllm_core.training.noise import apply_schedule, choose_blocks
from cllm_core.training.packing import (
    ExampleSize,
    PackedExample,
    PackPlan,
    build_layout,
    find_families,
    plan_packs,
)


class PackDataset(Dataset[dict[str, Tensor]]):
    """Packs of all epochs.

    Args:
        trajectories: the examples, at least one.
        noise: how noisy blocks are chosen, anew in each epoch; blocks_per_example=0 for fine-tuning.
        run: pack_length, epochs and seed are used; max_steps and packs_per_step for the progress of the schedule.
        noise_ids: for a gated adapter: blocks are of random tokens of these.
    """

    def __init__(
        self,
        trajectories: Sequence[Trajectory],
        noise: NoiseConfig,
        run: RunConfig,
        *,
        noise_ids: range | None = None,
    ) -> None:
        self._noise_ids = noise_ids
        self._trajectories = trajectories
        self._noise = noise
        self._seed = run.seed
        families = find_families([trajectory.prompt_ids for trajectory in trajectories])
        self._plans: list[tuple[int, PackPlan]] = []  # epoch and plan of each pack
        for epoch in range(math.ceil(run.epochs)):
            plans = self._plan_epoch(epoch, families, run.pack_length)
            share = min(1.0, run.epochs - epoch)
            self._plans += [(epoch, plan) for plan in plans[: math.ceil(share * len(plans))]]
        self._num_used = len(self._plans)  # packs up to the last step
        if run.max_steps is not None:
            self._num_used = min(self._num_used, run.max_steps * run.packs_per_step * world_size())

    def __len__(self) -> int:
        return len(self._plans)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return build_layout(self._groups(index)).as_dict()

    def num_examples(self) -> int:
        """Examples of all packs together."""
        return sum(len(group) for _, plan in self._plans for group in plan)

    def _groups(self, index: int) -> list[list[PackedExample]]:
        epoch, plan = self._plans[index]
        progress = min(1.0, index / self._num_used)
        return [[self._packed(epoch, example, progress) for example in group] for group in plan]

    def _packed(self, epoch: int, index: int, progress: float) -> PackedExample:
        trajectory = self._trajectories[index]
        blocks = apply_schedule(self._blocks(epoch, index), self._noise, progress=progress)
        return PackedExample(trajectory.prompt_ids, trajectory.output_ids, blocks)

    def _blocks(self, epoch: int, index: int) -> tuple[NoisyBlock, ...]:
        rng = random.Random(f"{self._seed}/{epoch}/{index}")
        if self._noise_ids is not None:
            return noise_blocks(self._trajectories[index], self._noise, self._noise_ids, rng)
        return choose_blocks(self._trajectories[index], self._noise, rng)

    def _plan_epoch(self, epoch: int, families: Sequence[Sequence[int]], pack_length: int) -> list[PackPlan]:
        sizes = [
            ExampleSize(
                trajectory.prompt_ids,
                len(trajectory.output_ids) - 1 + sum(len(block.draft_ids) for block in self._blocks(epoch, index)),
            )
            for index, trajectory in enumerate(self._trajectories)
        ]
        return plan_packs(sizes, families, pack_length=pack_length, seed=self._seed + epoch)
