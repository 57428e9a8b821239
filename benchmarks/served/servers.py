"""The servers that are compared: how each is started, when it is ready, what it wants in a request."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.served.records import BenchmarkError

AR = "cllm AR"
JACOBI = "cllm Jacobi"
LLAMA = "llama-server"
TRANSFORMERS = "transformers serve"

_READY_SECONDS = 600.0
_STOP_SECONDS = 20.0
_VERSION_SECONDS = 60.0
_POLL_SECONDS = 0.2
_LOG_TAIL = 2000  # characters
_LOOPBACK = "127.0.0.1"
_USAGE = {"include_usage": True}
_VERSION_LINE = re.compile(r"(?:version:\s*)?(\d.*)")
_CLLM = (sys.executable, "-c", "from server.cli import main; main()")


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """A server to compare.

    Attributes:
        name: in tables and plots.
        command: that starts it, "{port}" standing for the port; empty where it runs already.
        url: base of the API without /v1; None for one that is started here.
        ready_path: answers 200 as soon as requests are taken.
        model: name for requests; None asks the server for the first one it lists.
        stream_options: of every request.
        environment: variables beyond those of this process.
        version_command: prints what the program is; empty where there is none.
    """

    name: str
    command: tuple[str, ...] = ()
    url: str | None = None
    ready_path: str = "/health"
    model: str | None = None
    stream_options: dict[str, bool] = field(default_factory=lambda: dict(_USAGE))
    environment: dict[str, str] = field(default_factory=dict)
    version_command: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server that answers."""

    spec: ServerSpec
    url: str
    model: str


def cllm_server(name: str, model: str, *, flags: Sequence[str], num_threads: int | None) -> ServerSpec:
    """This project's server; usage tells how many forward passes an answer took."""
    threads = [] if num_threads is None else [f"--num-threads={num_threads}"]
    return ServerSpec(
        name=name,
        command=(*_CLLM, "serve", model, "--port={port}", *threads, *flags),
        ready_path="/ready",
        stream_options={**_USAGE, "include_decoding_stats": True},
    )


def llama_server(
    binary: Path,
    gguf: Path,
    *,
    name: str = LLAMA,
    concurrency: int,
    context: int,
    flags: Sequence[str],
    num_threads: int | None,
) -> ServerSpec:
    """llama.cpp's server, with a slot for each request in flight.

    Args:
        binary: the program; its libraries are looked for beside it.
        gguf: the model.
        name: in tables and plots.
        concurrency: most requests in flight.
        context: longest prompt and answer together, in tokens.
        flags: further ones.
        num_threads: None leaves the program's choice.
    """
    binary = binary.absolute()  # a bare name would be looked for in PATH
    threads = [] if num_threads is None else ["--threads", str(num_threads), "--threads-batch", str(num_threads)]
    size = ["--parallel", str(concurrency), "--ctx-size", str(concurrency * context)]
    libraries = os.pathsep.join(filter(None, [str(binary.parent), os.environ.get("LD_LIBRARY_PATH")]))
    return ServerSpec(
        name=name,
        command=(str(binary), "--model", str(gguf), "--host", _LOOPBACK, "--port", "{port}", *size, *threads, *flags),
        environment={"LD_LIBRARY_PATH": libraries},
        version_command=(str(binary), "--version"),
    )


def transformers_server(program: Path, model: Path, *, flags: Sequence[str], num_threads: int | None) -> ServerSpec:
    """`transformers serve`, in the precision of the folder."""
    program = program.absolute()  # a bare name would be looked for in PATH
    return ServerSpec(
        name=TRANSFORMERS,
        command=(str(program), "serve", str(model), "--host", _LOOPBACK, "--port", "{port}", *flags),
        model=str(model),
        environment={} if num_threads is None else {"OMP_NUM_THREADS": str(num_threads)},
        version_command=(str(program), "version"),
    )


def version_of(spec: ServerSpec) -> str:
    """What the program says of its version, "unknown" where it says nothing."""
    try:
        done = subprocess.run(
            spec.version_command,
            capture_output=True,
            text=True,
            check=True,
            timeout=_VERSION_SECONDS,
            env={**os.environ, **spec.environment},
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    lines = map(_VERSION_LINE.fullmatch, (done.stdout + done.stderr).splitlines())
    return next((line.group(1) for line in lines if line), "unknown")


@contextmanager
def running(spec: ServerSpec, log: Path) -> Iterator[Endpoint]:
    """The server, started and ready, or the one that runs already; stopped at the end if it was started here.

    Args:
        spec: of the server.
        log: file for what it writes.

    Raises:
        BenchmarkError: it cannot be started, ends, or does not get ready in time.
    """
    if spec.url is not None:
        yield _endpoint(spec, spec.url.rstrip("/").removesuffix("/v1"))
        return
    port = _free_port()
    command = [word.replace("{port}", str(port)) for word in spec.command]
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **spec.environment},
                start_new_session=True,  # so that its workers can be ended with it
            )
        except OSError as error:
            raise BenchmarkError(f"{spec.name}: cannot be started ({error}); is {command[0]} the program?") from error
        try:
            url = f"http://{_LOOPBACK}:{port}"
            _wait_ready(spec, url, process, log)
            yield _endpoint(spec, url)
        finally:
            _stop(process)


def _endpoint(spec: ServerSpec, url: str) -> Endpoint:
    return Endpoint(spec, url, spec.model or _first_model(spec, url))


def _first_model(spec: ServerSpec, url: str) -> str:
    try:
        listed = json.loads(_get(f"{url}/v1/models"))
        return str(listed["data"][0]["id"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BenchmarkError(f"{spec.name}: {url}/v1/models lists no model ({error}); is it an OpenAI API?") from error


def _get(url: str) -> bytes:
    key = os.environ.get("OPENAI_API_KEY")
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    with urllib.request.urlopen(request, timeout=10) as response:
        body: bytes = response.read()
    return body


def _wait_ready(spec: ServerSpec, url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise BenchmarkError(f"{spec.name}: ended with code {process.returncode}; {log} ends with:\n{_tail(log)}")
        try:
            _get(url + spec.ready_path)
        except OSError:  # not listening, or 503 while it loads
            time.sleep(_POLL_SECONDS)
        else:
            return
    raise BenchmarkError(f"{spec.name}: not ready after {_READY_SECONDS:.0f} s; {log} ends with:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-_LOG_TAIL:]


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask it to leave; whatever of its process group stays, be it the server or a worker behind it, is ended."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=_STOP_SECONDS)
    with suppress(ProcessLookupError):  # all have left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        port: int = probe.getsockname()[1]
    return port
