"""The processes of a launch."""

from pathlib import Path

import pytest

from cllm_core.training.config import DataConfig, TrajectoryConfig
from cllm_core.training.launch import take_gpu
from cllm_core.training.run import run_sft
from cllm_core.training.trajectories import record_trajectories
from tests.training.factories import make_sft, no_progress, write_questions


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """GPUs made the current one, on a machine that seems to have two."""
    found: list[int] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", found.append)
    return found


def test_every_process_of_a_launch_takes_its_own_gpu(taken: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    for local_rank in ("0", "1", "2"):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        take_gpu("auto")
    assert taken == [0, 1, 0]


def test_no_gpu_is_taken_without_a_launch_or_for_the_cpu(taken: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    take_gpu("auto")
    monkeypatch.setenv("LOCAL_RANK", "1")
    take_gpu("cpu")
    assert taken == []


class _ModelIsReadError(Exception):
    """Raised where the model would be read."""


def test_the_gpu_is_taken_before_the_model_is_read(
    taken: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`torchrun ... cllm trajectories` put every process on the first GPU."""

    def read(*args: object) -> None:
        raise _ModelIsReadError

    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("cllm_core.training.run.load_trainable", read)
    monkeypatch.setattr("cllm_core.training.trajectories.build_engine", read)
    data, output = write_questions(tmp_path), tmp_path / "out"
    with pytest.raises(_ModelIsReadError):
        record_trajectories(TrajectoryConfig(output=output, data=DataConfig(data=str(data))), no_progress)
    assert taken == [1]
    with pytest.raises(_ModelIsReadError):
        run_sft(make_sft(tmp_path, data, output, device="auto"), no_progress)
    assert taken == [1, 1]
