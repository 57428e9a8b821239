"""Load on one server, by Locust: python -m benchmarks.served.load JOB ANSWERS

Reads a LoadJob, writes its answers as JSON lines. A process of its own, because Locust replaces the sockets of the
whole process by gevent's, and so that the load costs the comparison's own process nothing.
"""

import os
import sys
import time
from collections import deque
from pathlib import Path
from typing import ClassVar, cast

import msgspec
from gevent.event import Event
from geventhttpclient import HTTPClient
from geventhttpclient.response import HTTPConnectionClosed, HTTPSocketPoolResponse
from locust import User, task
from locust.env import Environment
from locust.exception import StopUser

from benchmarks.served.records import Answer, LoadJob
from benchmarks.served.stream import Chunk, read_line

_PATH = "/v1/chat/completions"


class Load:
    """The prompts that are left, and the answers so far. Owned by the one process; greenlets take turns."""

    def __init__(self, job: LoadJob) -> None:
        self.job = job
        self.answers: list[Answer] = []
        self.done = Event()
        self._left = deque(range(len(job.prompts)))

    def take(self) -> int | None:
        """Index of the next prompt, None where none is left."""
        return self._left.popleft() if self._left else None

    def put(self, answer: Answer) -> None:
        """Keep an answer; the last one ends the load."""
        self.answers.append(answer)
        if len(self.answers) == len(self.job.prompts):
            self.done.set()


class Client(User):
    """Sends one prompt after the other over one connection until none is left."""

    abstract = True
    load: ClassVar[Load]

    def on_start(self) -> None:
        """Make the connection that the first request opens."""
        self._http = self._new_connection()

    @task
    def ask(self) -> None:
        """One prompt, one answer, also where the server fails."""
        prompt = self.load.take()
        if prompt is None:
            raise StopUser
        answer = _Arriving(prompt)
        try:
            answer.read(self._post(prompt))
        except Exception as error:  # whatever befalls a request is its result: without one the load would never end
            answer.error = f"{type(error).__name__}: {error}"
            self._reconnect()
        self.load.put(answer.end())

    def _post(self, prompt: int) -> HTTPSocketPoolResponse:
        """Send a prompt; once more where the server closed the connection since the request before, as it may."""
        body = _body(self.load.job, prompt)
        try:
            return self._http.post(_PATH, body, _headers())
        except HTTPConnectionClosed:
            self._reconnect()
            return self._http.post(_PATH, body, _headers())

    def _reconnect(self) -> None:
        self._http.close()
        self._http = self._new_connection()  # a pool of one does not get back a connection that failed

    def _new_connection(self) -> HTTPClient:
        timeout = self.load.job.timeout
        return HTTPClient.from_url(self.load.job.url, connection_timeout=timeout, network_timeout=timeout)


class _Arriving:
    """An answer on its way."""

    def __init__(self, prompt: int) -> None:
        self.error: str | None = None
        self._prompt = prompt
        self._started = time.perf_counter()
        self._texts: list[str] = []
        self._times: list[float] = []
        self._chunks: list[Chunk] = []

    def read(self, response: HTTPSocketPoolResponse) -> None:
        if response.status_code != 200:
            self.error = f"HTTP {response.status_code}: {response.read().decode(errors='replace')[:500]}"
            return
        while line := response.readline(b"\n"):
            chunk = read_line(line)
            if chunk is None:
                continue
            if chunk.error is not None:
                self.error = str(chunk.error)
            if chunk.text:
                self._texts.append(chunk.text)
                self._times.append(time.perf_counter())
            self._chunks.append(chunk)
        response.release()

    def end(self) -> Answer:
        usage = next((chunk.usage for chunk in reversed(self._chunks) if chunk.usage), None)
        reason = next((chunk.finish_reason for chunk in self._chunks if chunk.finish_reason), None)
        return Answer(
            prompt=self._prompt,
            started=self._started,
            finished=time.perf_counter(),
            first=self._times[0] if self._times else None,
            last=self._times[-1] if self._times else None,
            text="".join(self._texts),
            first_text=self._texts[0] if self._texts else "",
            finish_reason=reason,
            num_tokens=usage.completion_tokens if usage else None,
            num_forward_passes=usage.decoding.forward_passes if usage and usage.decoding else None,
            error=self.error or (None if reason else "the stream ended without a finish_reason"),
        )


def run_load(job: LoadJob) -> list[Answer]:
    """Send all prompts, `job.concurrency` at a time; the answers in the order in which they ended."""
    load = Load(job)
    users = cast(type[User], type("JobClient", (Client,), {"load": load}))
    runner = Environment(user_classes=[users], host=job.url).create_local_runner()
    runner.start(job.concurrency, spawn_rate=job.concurrency)  # all at once
    load.done.wait()
    runner.quit()
    return load.answers


def main() -> None:
    """Read the job, run it, write the answers."""
    job_file, answers_file = map(Path, sys.argv[1:])
    job = msgspec.json.decode(job_file.read_bytes(), type=LoadJob)
    lines = [msgspec.json.encode(answer) for answer in run_load(job)]
    answers_file.write_bytes(b"".join(line + b"\n" for line in lines))


def _body(job: LoadJob, prompt: int) -> bytes:
    return msgspec.json.encode(
        {
            "model": job.model,
            "messages": [{"role": "user", "content": job.prompts[prompt]}],
            "max_tokens": job.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": job.stream_options,
        }
    )


def _headers() -> dict[str, str]:
    key = os.environ.get("OPENAI_API_KEY")
    return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})


if __name__ == "__main__":
    main()
