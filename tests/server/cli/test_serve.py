"""The server as a process of its own: signals and the port it cannot have."""

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from tests.server.fakes import ANSWER, MODEL_NAME

SERVE = """
import sys
from cllm_core.logs import configure_logging
from server.cli.serve import DrainingServer
from server.settings import ServerSettings
from tests.server.fakes import ScriptedEngine

configure_logging(level="info", log_format="json")
engine = ScriptedEngine(step_seconds=0.15)
DrainingServer(engine, ServerSettings(port=int(sys.argv[1]), drain_seconds=20)).run()
"""


@contextmanager
def process(port: int = 0) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", SERVE, str(port)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as server:
        try:
            yield server
        finally:
            server.kill()


def logged(server: subprocess.Popen[str], event: str) -> dict[str, object]:
    """The first log line of this event."""
    assert server.stderr is not None
    for line in server.stderr:
        record: dict[str, object] = json.loads(line)
        if record["event"] == event:
            return record
    raise AssertionError(f"the process ended without logging {event!r}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_running_stream_finish_and_then_ends_the_process(number: signal.Signals) -> None:
    body = {"model": MODEL_NAME, "prompt": "Say:", "max_tokens": 100, "stream": True}
    with process() as server:
        url = str(logged(server, "listening")["address"])
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=20) as response:
            lines = response.iter_lines()
            first = next(lines)
            server.send_signal(number)
            data = [line.removeprefix("data: ") for line in (first, *lines) if line]
        text = "".join(json.loads(line)["choices"][0]["text"] for line in data[:-1])
        assert (text, data[-1]) == (ANSWER, "[DONE]")
        server.wait(timeout=10)


def test_a_port_in_use_ends_the_process_with_a_line_that_says_so() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with process(taken.getsockname()[1]) as server:
            assert server.wait(timeout=20) != 0
            assert server.stderr is not None
            assert "address already in use" in server.stderr.read()
