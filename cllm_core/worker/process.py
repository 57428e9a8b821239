"""The worker process: loads the engine, reports its progress, serves, and exits with a code that tells why.

    python -m cllm_core.worker --endpoint tcp://127.0.0.1:5557 --config '{"model": "..."}'

Started by a server (`--supervised`) it dies with its parent and leaves Ctrl-C to it; started by hand it serves any
server that connects, until SIGINT or SIGTERM.
"""

import argparse
import contextlib
import faulthandler
import importlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from socket import socketpair
from types import FrameType
from typing import cast, get_args

import msgspec

from cllm_core.config import EngineConfig
from cllm_core.errors import CllmError, ConfigError, describe_error
from cllm_core.heap import freeze_garbage_collector
from cllm_core.logs import LogFormat, LogLevel, configure_logging
from cllm_core.worker.loop import StepEngine, WorkerLoop
from cllm_core.worker.messages import (
    AdapterDone,
    Failed,
    LoadAdapter,
    Loading,
    Ready,
    Rejected,
    Shutdown,
    Submit,
    UnloadAdapter,
)
from cllm_core.worker.supervisor import STACK_SIGNAL
from cllm_core.worker.transport import WorkerSocket

logger = logging.getLogger(__name__)

EngineFactory = Callable[[EngineConfig, Callable[[str, float], None]], StepEngine]

DEFAULT_ENGINE = "cllm_core.engine.build:build_engine"

EXIT_LEFT = 0
EXIT_ENGINE_FAILED = 1
EXIT_BAD_SETTINGS = 2
EXIT_LOAD_FAILED = 3
EXIT_ORPHANED = 4

# How long a supervised worker waits for its parent's Hello. It comes within milliseconds, and without it nobody would
# learn why a load failed that fails at once.
_HELLO_SECONDS = 5.0

# Imported by loaders when they need them; half of the time of a start goes into imports.
_LOADER_MODULES = ("peft", "transformers.modeling_utils", "transformers.models.llama.modeling_llama")


class _ShutdownWhileLoading(BaseException):
    """A client said Shutdown during loading. Not an Exception, so that no loader swallows it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a worker with command-line arguments; returns the exit code."""
    options = _parser().parse_args(arguments)
    # Also where Python cannot run: inside a kernel that hangs, or after a segmentation fault.
    faulthandler.enable()
    faulthandler.register(STACK_SIGNAL, all_threads=True)
    configure_logging(level=options.log_level, log_format=options.log_format)
    try:
        config = read_config(options.config)
    except ConfigError as error:
        logger.error("%s", error)
        return EXIT_BAD_SETTINGS
    if options.standby and not _stand_by(options.engine):
        return EXIT_LEFT
    return run_worker(options.endpoint, config, engine=options.engine, supervised=options.supervised)


def _stand_by(engine: str) -> bool:
    """Import what loading takes, then wait for a byte on standard input; whether it came, before the parent left."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for module in (engine.partition(":")[0], *(_LOADER_MODULES if engine == DEFAULT_ENGINE else ())):
        with contextlib.suppress(ImportError):  # said when the engine is built
            importlib.import_module(module)
    return bool(os.read(0, 1))


def read_config(text: str) -> EngineConfig:
    """Decode the JSON of an EngineConfig; ConfigError names what is wrong with it."""
    try:
        return msgspec.json.decode(text, type=EngineConfig)
    except msgspec.DecodeError as error:
        raise ConfigError(f"config is not the JSON of an EngineConfig: {error}") from error


def run_worker(endpoint: str, config: EngineConfig, *, engine: str = DEFAULT_ENGINE, supervised: bool = False) -> int:
    """Load the engine and serve it until a Shutdown or a signal; takes over the signals of the process.

    Args:
        endpoint: tcp://ADDRESS:PORT or ipc://PATH to bind. There is no authentication: loopback, a private network,
            or a folder that only this user can enter.
        config: handed to the engine factory.
        engine: the factory as "module:function", an EngineFactory; the seam for other engines, as in tests.
        supervised: end when standard input closes and leave SIGINT to the parent.

    Returns:
        The exit code, one of EXIT_*.
    """
    if supervised:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        leave_with_parent(partial(_remove_ipc_folder, endpoint))
    else:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        socket = WorkerSocket(endpoint, Loading("importing the engine", 0.0))
    except ConfigError as error:
        logger.error("%s", error)
        return EXIT_BAD_SETTINGS
    with socket:
        try:
            _answer_commands(socket, wait_seconds=_HELLO_SECONDS if supervised else 0.0)
            loaded = _load(socket, config, engine)
        except _ShutdownWhileLoading:
            return EXIT_LEFT
        except Exception as error:
            if not isinstance(error, CllmError):
                logger.exception("loading failed")
            elif not supervised:  # else the parent reports it
                logger.error("loading failed: %s", error)
            # What is not ours may pass: memory not given back yet, a network that is away.
            socket.announce(Failed(error=describe_error(error), retry=not isinstance(error, CllmError)))
            return EXIT_LOAD_FAILED
        stop_signals = [signal.SIGTERM] if supervised else [signal.SIGTERM, signal.SIGINT]
        return _serve(socket, loaded, stop_signals, stream_interval=config.stream_interval)


def _serve(
    socket: WorkerSocket, engine: StepEngine, stop_signals: Sequence[signal.Signals], *, stream_interval: float
) -> int:
    # Only now: until here the default handlers end the process at once, also inside a long call of a loader.
    stop = StopSignals(stop_signals)
    socket.wake_on(stop)
    freeze_garbage_collector()
    socket.announce(Ready(engine.info))
    logger.info("ready: %s", engine.info.name)
    try:
        WorkerLoop(engine, socket, stop.requested, stream_interval=stream_interval).run()
    except Exception as error:
        logger.exception("the engine failed")
        socket.announce(Failed(error=f"the engine failed: {describe_error(error)}", retry=True))
        return EXIT_ENGINE_FAILED
    return EXIT_LEFT


def _load(socket: WorkerSocket, config: EngineConfig, engine: str) -> StepEngine:
    # Downloads report from threads of their own, and a ZeroMQ socket takes one thread at a time.
    lock = threading.Lock()

    def on_progress(stage: str, fraction: float) -> None:
        with lock:
            socket.announce(Loading(stage, fraction))
            _answer_commands(socket, wait_seconds=0.0)

    return _find_factory(engine)(config, on_progress)


def _find_factory(engine: str) -> EngineFactory:
    module, _, function = engine.partition(":")
    try:
        return cast(EngineFactory, vars(importlib.import_module(module))[function])
    except (ImportError, ValueError, KeyError) as error:
        raise ConfigError(f"engine={engine!r}: cannot import it ({error}); give module:function") from error


def _answer_commands(socket: WorkerSocket, *, wait_seconds: float) -> None:
    for client, command in socket.receive(wait_seconds):
        match command:
            case Submit(request):
                socket.send(client, Rejected(request.request_id, "the worker is still loading"))
            case LoadAdapter(call_id) | UnloadAdapter(call_id):
                socket.send(client, AdapterDone(call_id, "the worker is still loading"))
            case Shutdown():
                raise _ShutdownWhileLoading


def _remove_ipc_folder(endpoint: str) -> None:
    scheme, _, path = endpoint.partition("://")
    if scheme == "ipc":
        with contextlib.suppress(OSError):
            os.unlink(path)
            # Removes nothing but an empty folder: the private one of a supervisor that could not do it itself.
            Path(path).parent.rmdir()


def leave_with_parent(clean_up: Callable[[], None]) -> None:
    """End this process at once when standard input closes, as it does with the death of the parent that holds it.

    An orphan must not keep a GPU, so nothing is waited for: not a step, not the loading. The pipe works on every
    system and, unlike prctl(PR_SET_PDEATHSIG), does not fire when the mere thread ends that started the worker.
    Standard input itself becomes empty, so that no library takes the pipe for a person who answers questions.
    """
    lifeline = os.dup(0)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    threading.Thread(target=_watch, args=(lifeline, clean_up), name="lifeline", daemon=True).start()


def _watch(lifeline: int, clean_up: Callable[[], None]) -> None:
    try:
        while os.read(lifeline, 1024):
            pass
        clean_up()
    finally:
        os._exit(EXIT_ORPHANED)


class StopSignals:
    """Turns signals into a question and a file descriptor, so that a step is not torn and a blocking poll wakes up.

    Made in the main thread. Replaces the handlers of the signals for the rest of the process.
    """

    def __init__(self, signals: Iterable[signal.Signals]) -> None:
        self._requested = False
        self._reader, self._writer = socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in signals:
            signal.signal(number, self._request)

    def requested(self) -> bool:
        """Whether one of the signals has come."""
        return self._requested

    def fileno(self) -> int:
        """Readable once one of the signals has come."""
        return self._reader.fileno()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cllm_core.worker",
        description="Load a model and decode for the servers that connect.",
    )
    parser.add_argument(
        "--endpoint",
        required=True,
        help="where to listen: tcp://ADDRESS:PORT or ipc://PATH. There is no authentication: whoever reaches it can "
        "use and stop the worker, so bind to loopback or a private network only",
    )
    parser.add_argument("--config", default="{}", help="JSON of the engine's settings (cllm_core.config.EngineConfig)")
    parser.add_argument("--engine", default=DEFAULT_ENGINE, help="engine factory, module:function (%(default)s)")
    parser.add_argument(
        "--supervised", action="store_true", help="end when standard input closes, and leave SIGINT to the parent"
    )
    parser.add_argument(
        "--standby", action="store_true", help="import, then wait for a byte on standard input before anything else"
    )
    parser.add_argument("--log-level", choices=get_args(LogLevel), default="info")
    parser.add_argument("--log-format", choices=get_args(LogFormat), default="auto")
    return parser
