"""Examples, settings and tiny models for the tests of training."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
from transformers import PreTrainedModel

from cllm_core.training.attention import PACK_ATTENTION, register_pack_attention
from cllm_core.training.config import DataConfig, ModelConfig, NoiseConfig, RunConfig, SftConfig, TrainConfig
from cllm_core.training.examples import Trajectory
from cllm_core.training.noise import choose_blocks
from cllm_core.training.packing import PackedExample
from tests.architectures import Architecture
from tests.checkpoints import VOCAB_SIZE, build_model

FIRST_WORD_ID = 3  # after the special tokens


def random_ids(rng: random.Random, length: int) -> tuple[int, ...]:
    return tuple(rng.randrange(FIRST_WORD_ID, VOCAB_SIZE) for _ in range(length))


def make_group(
    *, num_examples: int = 3, prefix: int = 9, output: int = 10, block_length: int = 6, seed: int = 0
) -> list[PackedExample]:
    """Examples whose prompts share exactly `prefix` tokens, with made-up noisy blocks."""
    rng = random.Random(seed)
    shared = random_ids(rng, prefix)
    noise = NoiseConfig(block_length=block_length, blocks_per_example=3)
    group = []
    for index in range(num_examples):
        own = (FIRST_WORD_ID + index, *random_ids(rng, 2 + index))
        trajectory = Trajectory(shared + own, random_ids(rng, output + index))
        blocks = choose_blocks(trajectory, noise, rng)
        group.append(PackedExample(trajectory.prompt_ids, trajectory.output_ids, blocks))
    return group


def make_model(architecture: Architecture = "llama", *, packed: bool = True) -> PreTrainedModel:
    """A tiny random model in fp32; the same weights, whether it takes packs or plain sequences."""
    register_pack_attention()
    torch.set_num_threads(1)
    model = build_model(architecture)
    model.set_attn_implementation(PACK_ATTENTION if packed else "eager")
    return model


def write_lines(path: Path, records: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_questions(folder: Path, count: int = 12) -> Path:
    """Prompts with answers that a tiny model can learn a little of."""
    return write_lines(
        folder / "data.jsonl",
        [{"prompt": f"Repeat the token {i % 3}", "answer": f"the token {i % 3} the token"} for i in range(count)],
    )


def make_run(**changes: object) -> RunConfig:
    settings: dict[str, object] = {
        "epochs": 2.0,
        "pack_length": 96,
        "packs_per_step": 1,
        "precision": "float32",
        "device": "cpu",
        "logging_steps": 1,
        "learning_rate": 0.01,
        "num_threads": 1,
    }
    return RunConfig(**settings | changes)  # type: ignore[arg-type]


def make_sft(checkpoint: Path, data: Path, output: Path, **changes: object) -> SftConfig:
    return SftConfig(
        model=ModelConfig(model=str(checkpoint), output=output),
        data=DataConfig(data=str(data)),
        run=make_run(**changes),
    )


def make_train(checkpoint: Path, data: Path, output: Path, *, unroll: int = 0, **changes: object) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(model=str(checkpoint), output=output, domain="test"),
        data=DataConfig(data=str(data)),
        noise=NoiseConfig(block_length=5, blocks_per_example=2, unroll=unroll),
        run=make_run(**changes),
    )


def no_progress(stage: str, fraction: float) -> None:
    """Take progress and show none."""


def read_losses(folder: Path, name: str = "loss") -> list[float]:
    """One loss of every report."""
    entries = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    return [entry[name] for entry in entries if "loss" in entry]


def read_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """The adapter that a training wrote."""
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")
