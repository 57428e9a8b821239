"""The size of the KV cache: what is configured wins, else what is free, and never less than a block."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from cllm_core.config import EngineConfig
from cllm_core.engine import memory
from cllm_core.engine.memory import CPU_CACHE_SHARE, num_cache_blocks
from cllm_core.errors import ConfigError

GIB = 1024**3
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BYTES_PER_TOKEN = 1024  # blocks of 16 KiB


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A host with 4 GiB free and no control group; returns where one may be written."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=4 * GIB))
    monkeypatch.setattr(memory, "_CGROUP_LIMIT", tmp_path / "memory.max")
    monkeypatch.setattr(memory, "_CGROUP_USAGE", tmp_path / "memory.current")
    monkeypatch.setattr(memory, "_CGROUP_STAT", tmp_path / "memory.stat")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 0\n")
    return tmp_path


def blocks(
    device: torch.device = CPU,
    *,
    max_model_len: int = 10**6,
    step_bytes: int = 0,
    reserved_bytes: int = 0,
    **config: Any,
) -> int:
    return num_cache_blocks(
        EngineConfig(**config),
        bytes_per_token=BYTES_PER_TOKEN,
        max_model_len=max_model_len,
        device=device,
        step_bytes=step_bytes,
        reserved_bytes=reserved_bytes,
    )


def test_a_number_of_blocks_is_taken_as_it_is() -> None:
    assert blocks(num_cache_blocks=7, cache_memory_gib=1.0) == 7


def test_a_size_in_memory_is_divided_into_blocks() -> None:
    assert blocks(cache_memory_gib=0.5) == GIB // 2 // (16 * BYTES_PER_TOKEN)


def test_on_a_cpu_a_share_of_the_free_memory_is_taken() -> None:
    assert blocks() == int(CPU_CACHE_SHARE * 4 * GIB) // (16 * BYTES_PER_TOKEN)


def test_no_more_is_taken_than_all_requests_can_fill() -> None:
    assert blocks(max_model_len=33, max_num_seqs=5) == 5 * 3


def test_inside_a_container_its_limit_counts(host: Path) -> None:
    (host / "memory.max").write_text(f"{3 * GIB}\n")
    (host / "memory.current").write_text(f"{2 * GIB}\n")
    assert blocks() == int(CPU_CACHE_SHARE * GIB) // (16 * BYTES_PER_TOKEN)


def test_a_container_without_a_limit_has_the_memory_of_the_host(host: Path) -> None:
    (host / "memory.max").write_text("max\n")
    (host / "memory.current").write_text(f"{2 * GIB}\n")
    assert blocks() == int(CPU_CACHE_SHARE * 4 * GIB) // (16 * BYTES_PER_TOKEN)


def test_on_a_gpu_its_reserve_and_the_activations_stay_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6 * GIB, 8 * GIB))
    found = blocks(CUDA, gpu_memory_utilization=0.75, step_bytes=GIB)
    assert found == 3 * GIB // (16 * BYTES_PER_TOKEN)  # 6 free - a quarter of 8 - 1


@pytest.mark.parametrize("config", [{"cache_memory_gib": 1e-6}, {}])
def test_a_memory_without_room_for_a_block_is_refused(config: dict[str, Any], host: Path) -> None:
    (host / "memory.max").write_text("1000")
    (host / "memory.current").write_text("2000")
    with pytest.raises(ConfigError, match="does not hold one cache block of 16384 bytes"):
        blocks(**config)


def test_files_that_a_container_has_read_do_not_shrink_the_cache(host: Path) -> None:
    (host / "memory.max").write_text(f"{4 * GIB}\n")
    (host / "memory.current").write_text(f"{3 * GIB}\n")
    with_files = blocks()
    (host / "memory.stat").write_text(f"inactive_file {2 * GIB}\n")
    assert blocks() == 3 * with_files


def test_memory_of_what_is_loaded_later_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (GIB, GIB))
    for device, share in ((CPU, CPU_CACHE_SHARE), (CUDA, 1.0)):
        room = blocks(device, gpu_memory_utilization=1.0) - blocks(
            device, gpu_memory_utilization=1.0, reserved_bytes=GIB // 2
        )
        assert room == share * (GIB // 2) // (16 * BYTES_PER_TOKEN)
