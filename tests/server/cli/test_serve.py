"""The server as a process of its own: signals and the port it cannot have."""

import json
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from structlog.testing import capture_logs
from structlog.typing import EventDict

from server.cli.serve import example_request, is_loopback, serve
from server.settings import ServerSettings
from tests.server.fakes import ANSWER, MODEL_NAME, ScriptedEngine

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


def test_the_start_ends_in_a_line_with_a_request_to_copy() -> None:
    with process() as server:
        address = logged(server, "listening")["address"]
        assert server.stderr is not None
        events = (json.loads(line)["event"] for line in server.stderr)
        served, command = next(event for event in events if event.startswith("serving")).split("; try: ")
        assert served == f"serving {MODEL_NAME} at {address}/v1"
        answer = json.loads(subprocess.run(shlex.split(command), capture_output=True, check=True, timeout=20).stdout)
        assert answer["choices"][0]["message"]["content"] == ANSWER


def test_the_request_to_copy_asks_for_the_key_and_completes_where_there_is_no_chat_template() -> None:
    chat = example_request("http://a/v1", is_chat=True, needs_key=True)
    assert chat.startswith('curl http://a/v1/chat/completions -H "Authorization: Bearer $CLLM_API_KEY" -H ')
    plain = example_request("http://a/v1", is_chat=False, needs_key=False)
    assert plain.startswith("curl http://a/v1/completions -H 'Content-Type")
    assert json.loads(shlex.split(plain)[-1]) == {"prompt": "Once upon a time"}


@pytest.mark.parametrize(
    ("host", "is_own"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("::", False)],
)
def test_only_loopback_addresses_count_as_this_machine(host: str, is_own: bool) -> None:
    assert is_loopback(host) == is_own


def test_listening_for_other_machines_without_a_key_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.cli.serve.make_engine", lambda settings: ScriptedEngine())
    monkeypatch.setattr("server.cli.serve.configure_logging", lambda **options: None)
    monkeypatch.setattr("server.cli.serve.DrainingServer.run", lambda self: None)
    with capture_logs() as closed:
        serve(ServerSettings(host="127.0.0.1"))
        serve(ServerSettings(host="0.0.0.0", api_keys=("secret",)))
    with capture_logs() as open_to_all:
        serve(ServerSettings(host="0.0.0.0"))
    assert not warnings_in(closed)
    assert [entry["host"] for entry in warnings_in(open_to_all)] == ["0.0.0.0"]


def warnings_in(entries: list[EventDict]) -> list[EventDict]:
    return [entry for entry in entries if entry["event"].startswith("no API key is needed")]


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
