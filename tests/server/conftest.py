"""Fixtures of the server tests."""

from collections.abc import Iterator

import pytest
import structlog

from tests.server.fakes import ScriptedEngine
from tests.server.harness import RunningServer, running


@pytest.fixture(scope="session", autouse=True)
def _plain_logs() -> None:
    """Without this structlog draws tracebacks with all local variables, which takes seconds."""
    structlog.configure(
        processors=[structlog.processors.format_exc_info, structlog.processors.KeyValueRenderer()],
        logger_factory=structlog.ReturnLoggerFactory(),
        cache_logger_on_first_use=False,
    )


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """A server over a ScriptedEngine with its default script, shared by the tests of a module."""
    with running(ScriptedEngine()) as running_server:
        yield running_server
