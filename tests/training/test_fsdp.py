"""FSDP, as accelerate's environment asks for it: two processes on the CPU that hold half of the weights each."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cllm_core.errors import ConfigError
from cllm_core.training.run import run_train
from cllm_core.training.trainer import require_sharding
from tests.training.factories import (
    make_train,
    no_progress,
    read_adapter,
    read_losses,
    write_questions,
)

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}
ROOT = Path(__file__).parents[2]


def train_sharded(checkpoint: Path, data: Path, output: Path) -> None:
    """`cllm train` with the settings of `make_train`, in two processes."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "tests.training.fsdp_on_cpu", "train", checkpoint, "--data", data, "--output", output,
        "--domain", "test", "--block-length", 5, "--blocks-per-example", 2, "--unroll", 1,
        "--epochs", 8, "--pack-length", 96, "--packs-per-step", 1, "--precision", "float32", "--device", "cpu",
        "--logging-steps", 1, "--save-steps", 8, "--learning-rate", 0.01, "--num-threads", 1,
    ]  # fmt: skip
    environment = os.environ | FSDP | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(part) for part in command],
        check=False,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_sharded_training_equals_that_of_one_process_and_resumes(tiny_llama: Path, tmp_path: Path) -> None:
    data = write_questions(tmp_path)
    config = make_train(tiny_llama, data, tmp_path / "one", unroll=1, epochs=8.0, packs_per_step=2)
    one = run_train(config, no_progress)
    sharded = tmp_path / "sharded"
    train_sharded(tiny_llama, data, sharded)

    checkpoints = sorted((sharded / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    shards = [path.stat().st_size for path in (checkpoints[0] / "pytorch_model_fsdp_0").glob("*.distcp")]
    assert len(shards) == 2
    assert max(shards) < 0.6 * sum(shards)
    assert_equal_runs(sharded, one)

    for path in checkpoints[1:]:
        shutil.rmtree(path)
    (sharded / "adapter_model.safetensors").unlink()
    train_sharded(tiny_llama, data, sharded)
    assert_equal_runs(sharded, one)


def assert_equal_runs(run: Path, reference: Path) -> None:
    assert read_losses(run) == pytest.approx(read_losses(reference), rel=1e-4)
    expected = read_adapter(reference)
    found = read_adapter(run)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_fsdp_that_would_not_shard_is_refused(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="1 on cpu; start them with torchrun"):
        run_train(make_train(tiny_llama, write_questions(tmp_path), tmp_path / "out"), no_progress)


def test_the_fsdp_that_cannot_mix_number_formats_is_refused() -> None:
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1))
    with pytest.raises(ConfigError, match="set FSDP_VERSION=2"):
        require_sharding(state)
