"""Log records of the worker process, in the form of the server's: structlog lines or JSON on stderr."""

import logging
import sys
from typing import Literal

import structlog
from structlog.typing import Processor

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["auto", "console", "json"]


def configure_logging(level: LogLevel, log_format: LogFormat) -> None:
    """Send every record of this process to stderr; auto takes console lines on a terminal, else JSON."""
    as_json = log_format == "json" or (log_format == "auto" and not sys.stderr.isatty())
    annotate: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=annotate,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_renderers(as_json)],
        )
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def _renderers(as_json: bool) -> list[Processor]:
    if as_json:
        return [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer()]
    return [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
