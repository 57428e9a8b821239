"""Servers for the clients: `cllm serve` with a tiny random model, and one whose engine follows a script."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.agent_engine import agent_engine
from tests.server.harness import RunningServer, running
from tests.server.serve_process import ServeProcess, serving

MESSAGES = [{"role": "user", "content": "Hello"}]
LIMIT = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="session")
def checkpoint(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny random checkpoint with room for descriptions of tools, which its tokenizer spells in many tokens."""
    folder = tmp_path_factory.mktemp("roomy") / "checkpoint"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    return folder


@pytest.fixture(scope="session")
def served(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    with serving(checkpoint, tmp_path_factory.mktemp("serve") / "log", "--num-cache-blocks=128") as process:
        yield process


@pytest.fixture(scope="session")
def expected(served: ServeProcess) -> str:
    """What plain HTTP gets for the question that the clients ask."""
    body = {"model": "tiny", "messages": MESSAGES, **LIMIT}
    return str(served.http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"])


@pytest.fixture
def agent_server() -> Iterator[RunningServer]:
    """A server whose engine says what the test has it say; it has room for the prompts of coding agents."""
    with running(agent_engine(), served_model_names=["tiny"]) as server:
        yield server
