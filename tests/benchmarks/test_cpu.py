"""The benchmark for CPUs runs from start to end on a tiny model, and compares with llama-bench where it is given."""

import json
import stat
from pathlib import Path

import pytest

from benchmarks import cpu

SPEEDS = [{"n_prompt": 8, "avg_ts": 0.5}, {"n_prompt": 20, "avg_ts": 0.25}]


def test_every_goal_is_measured(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"PROMPT_SIZES": (8, 20), "LONG_PROMPT": 60, "NUM_SAMPLED": 3, "NUM_IN_FLIGHT": 4, "NUM_COMPARED": 3}
    for name, value in sizes.items():
        monkeypatch.setattr(cpu, name, value)
    monkeypatch.setattr(cpu, "MAX_TOKENS", 4)
    program = tmp_path / "llama-bench"
    program.write_text(f"#!/bin/sh\necho '{json.dumps(SPEEDS)}'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    arguments = [str(tiny_llama), "--output", str(tmp_path / "out"), "--rounds", "1"]
    cpu.main([*arguments, "--llama-bench", str(program), "--gguf", str(tmp_path / "model.gguf")])
    record = json.loads((tmp_path / "out" / "cpu.json").read_text())
    goals = {goal["name"]: goal for goal in record["goals"]}
    assert len(goals) == 7
    prompt = goals["prompt tokens/s over llama-bench pp20"]
    assert prompt["value"] == f"{prompt['details']['engine'] / 0.25:.2f}x"
    assert goals["greedy texts equal alone, in a batch of 16 and cached, float32"]["value"] == "100%"
    page = (tmp_path / "out" / "cpu.md").read_text()
    assert str(tmp_path) not in page
    assert all(f"| {name} |" in page for name in goals)


def test_a_busy_core_is_free_again_afterwards() -> None:
    with cpu._busy_core() as process:
        assert process.poll() is None
    assert process.poll() is not None
