"""Adapters through `cllm serve` as a user starts it: named at the start, loaded later, there again after a crash."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import write_adapter
from tests.server.harness import wait_until
from tests.server.serve_process import ServeProcess, serving


@pytest.fixture(scope="module")
def served(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    folder = tmp_path_factory.mktemp("adapters")
    sql = write_adapter(folder / "sql", tiny_llama)
    write_adapter(folder / "chat", tiny_llama, seed=2)
    options = (f"--adapter=sql={sql}", f"--adapter-root={folder}")
    with serving(tiny_llama, folder / "log", *options) as process:
        yield process


def test_adapters_serve_from_the_start_from_later_and_after_a_crash(served: ServeProcess) -> None:
    loaded = served.http.post("/v1/load_lora_adapter", json={"lora_name": "chat", "lora_path": "chat"})
    assert loaded.status_code == 200, loaded.text
    names = ("tiny", "sql", "chat")
    before = [served.complete(model=name, max_tokens=20, ignore_eos=True) for name in names]
    assert len(set(before)) == 3
    os.kill(int(str(served.logged("worker process")[-1]["event"]).split()[2]), signal.SIGKILL)
    wait_until(lambda: served.http.get("/health").json()["num_restarts"] == 1)
    served.wait_ready()
    assert [served.complete(model=name, max_tokens=20, ignore_eos=True) for name in names] == before


def test_a_bad_load_is_answered_and_changes_nothing(served: ServeProcess) -> None:
    answer = served.http.post("/v1/load_lora_adapter", json={"lora_name": "other", "lora_path": "\0"})
    assert answer.status_code == 400
    answer = served.http.post("/v1/load_lora_adapter", json={"lora_name": "other", "lora_path": ".."})
    assert "lies outside of the folder" in answer.json()["error"]["message"]
    assert served.complete(model="sql", max_tokens=1)
