"""A model divided among two processes says what it says in one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cllm_core.config import EngineConfig
from cllm_core.errors import ConfigError, ModelLoadError
from cllm_core.models.loader import load_model
from tests.architectures import Architecture
from tests.conftest import CheckpointFactory

# A process of its own: it becomes rank 0 of a process group.
SCRIPT = """
import json, os, signal, sys
import psutil
from cllm_core.llm import LLM
from cllm_core.request import SamplingParams

def main():
    folder, size, ends_follower = sys.argv[1], int(sys.argv[2]), len(sys.argv) > 3
    llm = LLM(folder, device="cpu", dtype="float32", num_threads=1, num_cache_blocks=48, max_num_seqs=3,
              tensor_parallel_size=size)
    if ends_follower:
        psutil.Process().children()[0].kill()
    prompts = ["Once upon a time", "Hello there, what is it?", "Once upon a time there was"] * 2
    kinds = [
        SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=2),
        SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, block_length=1),
        SamplingParams(temperature=1, top_p=0.9, seed=3, max_tokens=40, ignore_eos=True),
    ]
    texts, logprobs = [], []
    for params in kinds:
        for request in llm.generate(prompts, params, progress=False):
            for output in request.outputs:
                texts.append(list(output.token_ids))
                logprobs += [token.logprobs.logprob for token in output.logprobs or ()]
    print(json.dumps({"texts": texts, "logprobs": logprobs, "layers": llm.info.paths.layers.reason}))

if __name__ == "__main__":
    main()
"""


def run(folder: Path, size: int, *more: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", SCRIPT, str(folder), str(size), *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def answers(folder: Path, size: int) -> dict[str, Any]:
    finished = run(folder, size)
    assert finished.returncode == 0, finished.stderr[-3000:]
    said: dict[str, Any] = json.loads(finished.stdout)
    return said


@pytest.mark.parametrize(
    "architecture",
    ["llama", pytest.param("qwen3", marks=pytest.mark.slow), pytest.param("mistral", marks=pytest.mark.slow)],
)
def test_two_processes_say_what_one_says(tiny_checkpoint: CheckpointFactory, architecture: Architecture) -> None:
    whole, divided = (answers(tiny_checkpoint(architecture), size) for size in (1, 2))
    assert divided["texts"] == whole["texts"]
    assert len(divided["logprobs"]) == 240
    assert divided["logprobs"] == pytest.approx(whole["logprobs"], abs=1e-4)
    assert "divided" in divided["layers"]


def test_a_process_that_dies_takes_the_others_with_it(tiny_llama: Path) -> None:
    finished = run(tiny_llama, 2, "kill")
    assert finished.returncode != 0


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (3, "its 4 attention heads cannot be divided among tensor_parallel_size=3 devices; choose 1 or 2"),
        (4, "its 2 key and value heads cannot be divided among tensor_parallel_size=4 devices; choose 1 or 2"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(tiny_llama: Path, size: int, message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        load_model(EngineConfig(model=str(tiny_llama), tensor_parallel_size=size), lambda stage, fraction: None)


@pytest.mark.parametrize(
    "setting", [{"adapter": "x"}, {"adapters": {"a": "x"}}, {"adapter_root": "x"}, {"quantization": "int8"}]
)
def test_what_cannot_be_divided_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size=2"):
        EngineConfig(tensor_parallel_size=2, **setting)
