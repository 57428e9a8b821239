"""Structured logs of the server and of the worker: one structlog pipeline for our own loggers and the libraries'."""

import atexit
import contextlib
import logging
import queue
import sys
import threading
from logging.handlers import QueueHandler
from typing import Literal

import structlog
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import Processor

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["auto", "console", "json"]


# Waiting to be written; more are dropped and counted, for a reader that hangs must not hang the server.
_MAX_WAITING_RECORDS = 10_000

_LAST_WORDS_SECONDS = 5.0


class BackgroundHandler(QueueHandler):
    """Hands records to a thread that writes them, so that no event loop waits for who reads the log.

    Args:
        target: renders and writes them.
        max_waiting: records that may wait to be written.

    Attributes:
        num_dropped: records that were not written, since too many waited.
    """

    def __init__(self, target: logging.Handler, *, max_waiting: int = _MAX_WAITING_RECORDS) -> None:
        self._waiting: queue.Queue[logging.LogRecord | None] = queue.Queue(max_waiting)
        super().__init__(self._waiting)
        self.num_dropped = 0
        self._target = target
        self._writer = threading.Thread(target=self._write, name="log", daemon=True)
        self._writer.start()
        atexit.register(self.stop)

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """The record as it is: it stays in this process."""
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        """Queue the record, or count it where the queue is full."""
        try:
            self._waiting.put_nowait(record)
        except queue.Full:
            self.num_dropped += 1

    def stop(self) -> None:
        """Write what waits, for as long as somebody reads it, and end the thread. May be called twice."""
        atexit.unregister(self.stop)
        if self._writer.is_alive():
            with contextlib.suppress(queue.Full):
                self._waiting.put(None, timeout=_LAST_WORDS_SECONDS)
            self._writer.join(timeout=_LAST_WORDS_SECONDS)

    def _write(self) -> None:
        while (record := self._waiting.get()) is not None:
            self._target.handle(record)


def num_dropped_records() -> int:
    """Log records of this process that were dropped."""
    return sum(
        handler.num_dropped for handler in logging.getLogger().handlers if isinstance(handler, BackgroundHandler)
    )


def configure_logging(*, level: LogLevel, log_format: LogFormat, in_background: bool = False) -> None:
    """Send every log record of this process to stderr, as console lines or as JSON lines.

    Args:
        level: least severity of what is logged.
        log_format: auto is console on a terminal, else JSON lines.
        in_background: write from a thread of its own.
    """
    as_json = log_format == "json" or (log_format == "auto" and not sys.stderr.isatty())
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=_renderers(as_json)))
    root = logging.getLogger()
    for before in root.handlers:
        if isinstance(before, BackgroundHandler):
            before.stop()
    root.handlers = [BackgroundHandler(handler) if in_background else handler]
    root.setLevel(level.upper())
    _quieten_libraries()


def _renderers(as_json: bool) -> list[Processor]:
    remove_meta = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    # Without local variables: those hold prompts and keys, and rendering them holds up the event loop for seconds.
    if as_json:
        tracebacks = structlog.processors.ExceptionRenderer(ExceptionDictTransformer(show_locals=False))
        return [remove_meta, tracebacks, structlog.processors.JSONRenderer()]
    plain = structlog.dev.plain_traceback
    return [remove_meta, structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)]


def _quieten_libraries() -> None:
    """Our access line replaces uvicorn's; the other libraries' chatter says nothing to who runs the server."""
    logging.getLogger("uvicorn.access").disabled = True
    for name in ("uvicorn.error", "sse_starlette", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)
