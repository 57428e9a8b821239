"""The worker process: loads the engine, says how that goes, serves, and leaves with an exit code that tells why.

    python -m cllm_core.worker --endpoint tcp://127.0.0.1:5557 --config '{"model": "..."}'

Started by a server (`--supervised`) it dies with its parent and leaves Ctrl-C to it; started by hand it serves any
server that connects, until SIGINT or SIGTERM.
"""

import argparse
import contextlib
import importlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import cast, get_args

import msgspec

from cllm_core.config import EngineConfig
from cllm_core.errors import CllmError, ConfigError
from cllm_core.heap import settle_heap
from cllm_core.logs import LogFormat, LogLevel, configure_logging
from cllm_core.worker.channel import WorkerChannel
from cllm_core.worker.lifeline import StopSignals, leave_with_parent
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

logger = logging.getLogger(__name__)

EngineFactory = Callable[[EngineConfig, Callable[[str, float], None]], StepEngine]

DEFAULT_ENGINE = "cllm_core.engine.build:build_engine"

EXIT_LEFT = 0
EXIT_ENGINE_FAILED = 1
EXIT_BAD_SETTINGS = 2
EXIT_LOAD_FAILED = 3

# How long a supervised worker waits for its parent's Hello. It comes within milliseconds, and without it nobody would
# hear why a load failed that fails at once.
_HELLO_SECONDS = 5.0


class _LeaveWhileLoading(BaseException):
    """A client said Shutdown during loading. Not an Exception, so that no loader swallows it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a worker with command-line arguments; returns the exit code."""
    options = _parser().parse_args(arguments)
    configure_logging(level=options.log_level, log_format=options.log_format)
    try:
        config = read_config(options.config)
    except ConfigError as error:
        logger.error("%s", error)
        return EXIT_BAD_SETTINGS
    return run_worker(options.endpoint, config, engine=options.engine, supervised=options.supervised)


def read_config(text: str) -> EngineConfig:
    """Decode the JSON of an EngineConfig; ConfigError names what is wrong with it."""
    try:
        return msgspec.json.decode(text, type=EngineConfig)
    except msgspec.DecodeError as error:
        raise ConfigError(f"config is not the JSON of an EngineConfig: {error}") from error


def run_worker(endpoint: str, config: EngineConfig, *, engine: str = DEFAULT_ENGINE, supervised: bool = False) -> int:
    """Load the engine and serve it until told to leave; takes over the signals of the process.

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
        channel = WorkerChannel(endpoint, Loading("importing the engine", 0.0))
    except ConfigError as error:
        logger.error("%s", error)
        return EXIT_BAD_SETTINGS
    with channel:
        try:
            _answer_while_loading(channel, wait_seconds=_HELLO_SECONDS if supervised else 0.0)
            loaded = _load(channel, config, engine)
        except _LeaveWhileLoading:
            return EXIT_LEFT
        except Exception as error:
            # Our own errors speak for themselves.
            logger.error("loading failed: %s", _describe(error), exc_info=not isinstance(error, CllmError))
            # What is not ours may pass: memory not given back yet, a network that is away.
            channel.announce(Failed(error=_describe(error), retry=not isinstance(error, CllmError)))
            return EXIT_LOAD_FAILED
        stop_signals = [signal.SIGTERM] if supervised else [signal.SIGTERM, signal.SIGINT]
        return _serve(channel, loaded, stop_signals, stream_interval=config.stream_interval)


def _serve(
    channel: WorkerChannel, engine: StepEngine, stop_signals: Sequence[signal.Signals], *, stream_interval: float
) -> int:
    # Only now: until here the default handlers end the process at once, also inside a long call of a loader.
    stop = StopSignals(stop_signals)
    channel.wake_on(stop)
    settle_heap()
    channel.announce(Ready(engine.info))
    logger.info("ready: %s", engine.info.name)
    try:
        WorkerLoop(engine, channel, stop.requested, stream_interval=stream_interval).run()
    except Exception as error:
        logger.exception("the engine failed")
        channel.announce(Failed(error=f"the engine failed: {_describe(error)}", retry=True))
        return EXIT_ENGINE_FAILED
    return EXIT_LEFT


def _load(channel: WorkerChannel, config: EngineConfig, engine: str) -> StepEngine:
    # Downloads report from threads of their own, and a ZeroMQ socket takes one thread at a time.
    turn = threading.Lock()

    def on_progress(stage: str, fraction: float) -> None:
        with turn:
            channel.announce(Loading(stage, fraction))
            _answer_while_loading(channel, wait_seconds=0.0)

    return _find_factory(engine)(config, on_progress)


def _find_factory(engine: str) -> EngineFactory:
    module, _, function = engine.partition(":")
    try:
        return cast(EngineFactory, vars(importlib.import_module(module))[function])
    except (ImportError, ValueError, KeyError) as error:
        raise ConfigError(f"engine={engine!r}: cannot import it ({error}); give module:function") from error


def _answer_while_loading(channel: WorkerChannel, *, wait_seconds: float) -> None:
    for client, command in channel.receive(wait_seconds):
        match command:
            case Submit(request):
                channel.send(client, Rejected(request.request_id, "the worker is still loading"))
            case LoadAdapter(call_id) | UnloadAdapter(call_id):
                channel.send(client, AdapterDone(call_id, "the worker is still loading"))
            case Shutdown():
                raise _LeaveWhileLoading


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, CllmError) else f"{type(error).__name__}: {error}"


def _remove_ipc_folder(endpoint: str) -> None:
    scheme, _, path = endpoint.partition("://")
    if scheme == "ipc":
        with contextlib.suppress(OSError):
            os.unlink(path)
            # Removes nothing but an empty folder: the private one of a supervisor that could not do it itself.
            Path(path).parent.rmdir()


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
    parser.add_argument("--log-level", choices=get_args(LogLevel), default="info")
    parser.add_argument("--log-format", choices=get_args(LogFormat), default="auto")
    return parser
