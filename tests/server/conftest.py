"""Fixtures of the server tests."""

from collections.abc import Iterator

import pytest
import structlog

from cllm_core.heap import freeze_garbage_collector
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


@pytest.fixture(scope="module", autouse=True)
def _frozen_garbage_collector() -> None:
    """As in a server. What the tests before have left takes a second to look through, as long as a request may cost."""
    freeze_garbage_collector()


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """A server over a ScriptedEngine with its default script, shared by the tests of a module."""
    with running(ScriptedEngine()) as running_server:
        yield running_server
