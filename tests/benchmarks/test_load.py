"""A load ends with an answer for every prompt, whatever the server does to its connections."""

import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from benchmarks.served.records import Answer, LoadJob

CHUNK = b'data: {"choices":[{"index":0,"delta":{"content":"Hi"},"finish_reason":"stop"}]}\n\n'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % len(CHUNK)


class ClosesSilently(socketserver.StreamRequestHandler):
    """Answers one request of a connection as if more could follow, and closes it."""

    def handle(self) -> None:
        length = 0
        while (line := self.rfile.readline()).strip():
            if line.lower().startswith(b"content-length:"):
                length = int(line.partition(b":")[2])
        self.rfile.read(length)
        self.wfile.write(HEAD + CHUNK)


class NoHttp(socketserver.StreamRequestHandler):
    """Speaks another protocol."""

    def handle(self) -> None:
        self.rfile.readline()
        self.wfile.write(b"\x00\x01\x02\r\n\r\n")


@contextmanager
def listening(handler: type[socketserver.StreamRequestHandler]) -> Iterator[str]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def answers_of(url: str, folder: Path) -> list[Answer]:
    job = LoadJob(
        url=url, model="m", prompts=["a", "b", "c"], concurrency=1, max_tokens=4, stream_options={}, timeout=5.0
    )
    (folder / "job.json").write_bytes(msgspec.json.encode(job))
    command = [sys.executable, "-m", "benchmarks.served.load", str(folder / "job.json"), str(folder / "answers.jsonl")]
    subprocess.run(command, check=True, timeout=60, capture_output=True)
    return [msgspec.json.decode(line, type=Answer) for line in (folder / "answers.jsonl").read_bytes().splitlines()]


def test_a_connection_closed_between_requests_is_opened_again(tmp_path: Path) -> None:
    with listening(ClosesSilently) as url:
        answers = answers_of(url, tmp_path)
    assert [(answer.text, answer.error) for answer in answers] == [("Hi", None)] * 3


def test_failures_are_answers(tmp_path: Path) -> None:
    with listening(NoHttp) as url:
        answers = answers_of(url, tmp_path)
    assert len(answers) == 3
    assert all(answer.error for answer in answers)
