"""The engine without HTTP and without a second process: what served figures are compared with.

    python -m benchmarks.served.engine_alone    (the settings, then prompts, come on standard input)

The first line is an EngineConfig as JSON, answered by the model's name once it is loaded. Every further line is a
LoadJob, of which prompts and max_tokens are used, answered by a list of Answer. Prompts are decoded one at a time.
"""

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import msgspec

from benchmarks.served.records import Answer, BenchmarkError, LoadJob
from cllm_core import LLM, SamplingParams
from cllm_core.config import EngineConfig
from cllm_core.heap import freeze_garbage_collector

NAME = "engine alone"


class EngineAlone:
    """The engine in its own process, seen from here."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log

    def answer(self, prompts: Sequence[str], max_tokens: int) -> list[Answer]:
        """Decode the prompts one after the other.

        Raises:
            BenchmarkError: the process ended.
        """
        job = LoadJob(url="", model="", prompts=list(prompts), concurrency=1, max_tokens=max_tokens, stream_options={})
        return msgspec.json.decode(self.ask(job), type=list[Answer])

    def ask(self, message: object) -> bytes:
        """Send a line and wait for the line that answers it."""
        if self._process.stdin is None or self._process.stdout is None:
            raise BenchmarkError(f"{NAME}: was started without pipes")
        try:
            _write_line(self._process.stdin, message)
            line = self._process.stdout.readline()
        except OSError:
            line = b""
        if not line:
            raise BenchmarkError(f"{NAME}: ended with code {self._process.wait()}; see {self._log}")
        return line


@contextmanager
def engine_alone(config: EngineConfig, log: Path) -> Iterator[EngineAlone]:
    """The engine, loaded; ended with the block.

    Args:
        config: what to load.
        log: file for what the process reports.

    Raises:
        BenchmarkError: it does not start.
    """
    command = [sys.executable, "-m", "benchmarks.served.engine_alone"]
    with (
        log.open("wb") as errors,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        engine = EngineAlone(process, log)
        try:
            engine.ask(config)
            yield engine
        finally:
            process.terminate()


def main() -> None:
    """Answer line by line until the input ends."""
    config = msgspec.json.decode(sys.stdin.buffer.readline(), type=EngineConfig)
    llm = LLM(**msgspec.structs.asdict(config))
    freeze_garbage_collector()  # as the worker does
    _write_line(sys.stdout.buffer, llm.info.name)
    for line in sys.stdin.buffer:
        job = msgspec.json.decode(line, type=LoadJob)
        answers = [_answer(llm, number, prompt, job.max_tokens) for number, prompt in enumerate(job.prompts)]
        _write_line(sys.stdout.buffer, answers)


def _answer(llm: LLM, number: int, prompt: str, max_tokens: int) -> Answer:
    started = time.perf_counter()
    pieces, times = [], []
    reason, num_tokens, num_passes = None, 0, 0
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    for delta, stats in llm.stream_chat([{"role": "user", "content": prompt}], params):
        if delta.text:
            pieces.append(delta.text)
            times.append(time.perf_counter())
        reason, num_tokens, num_passes = delta.finish_reason, stats.num_output_tokens, stats.num_forward_passes
    return Answer(
        prompt=number,
        started=started,
        finished=time.perf_counter(),
        first=times[0] if times else None,
        last=times[-1] if times else None,
        text="".join(pieces),
        first_text=pieces[0] if pieces else "",
        finish_reason=reason,
        num_tokens=num_tokens,
        num_forward_passes=num_passes,
    )


def _write_line(stream: IO[bytes], message: object) -> None:
    stream.write(msgspec.json.encode(message) + b"\n")
    stream.flush()


if __name__ == "__main__":
    main()
