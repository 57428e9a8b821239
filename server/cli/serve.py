"""`cllm serve`: the app under uvicorn, with the worker behind it, from the banner to the drained end."""

import asyncio
import contextlib
import functools
import ipaddress
import socket
import time
from collections.abc import Sequence

import structlog
import uvicorn

from cllm_core.heap import freeze_garbage_collector
from cllm_core.logs import configure_logging
from cllm_core.worker.client import RequestTimeouts, remote_worker, supervised_worker
from cllm_core.worker.engine_client import EngineClient

from ..app import create_app
from ..http.connections import ConnectionLimits, Connections, GuardedProtocol, raise_descriptor_limit
from ..served_models import LoadedModel
from ..services import Services
from ..settings import ServerSettings

# Beyond the drain's own grace: for last events to be written before uvicorn cuts connections.
_CLOSE_SECONDS = 5

# Longer than the pools of common clients keep a connection, so that they never write into one that is closing.
_KEEP_ALIVE_SECONDS = 75

_POLL_SECONDS = 0.1

_log = structlog.stdlib.get_logger(__name__)


class DrainingServer(uvicorn.Server):
    """A uvicorn server that lets running requests finish within a grace time and ends the rest with an error event."""

    def __init__(self, engine: EngineClient, settings: ServerSettings) -> None:
        app = create_app(engine, settings)
        self.connections = Connections(_connection_limits(settings))
        super().__init__(
            uvicorn.Config(
                app,
                # uvicorn makes each protocol by keyword arguments.
                http=functools.partial(GuardedProtocol, connections=self.connections),  # type: ignore[arg-type]
                host=settings.host,
                port=settings.port,
                log_config=None,
                access_log=False,
                server_header=False,
                ws="none",
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=int(settings.drain_seconds) + _CLOSE_SECONDS,
            )
        )
        self._engine = engine
        self._settings = settings
        self._services: Services = app.state.services
        self._services.metrics.watch_connections(self.connections)
        self._is_announced = False
        self.has_failed = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the engine and listen; the log says where."""
        await super().startup(sockets)
        for server in self.servers:
            for address in _addresses(server.sockets):
                _log.info("listening", address=address, api=f"{address}/v1", docs=f"{address}/docs")

    async def on_tick(self, counter: int) -> bool:
        """Whether to exit: also where the engine has failed for good, unless the settings say to stay up."""
        if not self._is_announced and (model := self._services.models.first_or_none) is not None:
            self._is_announced = True
            self._announce(model)
        self.has_failed = self._engine.status.state == "failed" and not self._settings.stay_up
        return await super().on_tick(counter) or self.has_failed

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Turn /ready to 503, stop accepting, drain the engine while open connections are answered, stop the engine."""
        self._services.shutdown.has_begun = True
        if not self.has_failed:
            await self._serve_unready(self._settings.shutdown_delay)
        _log.info("shutting down: running requests may finish", grace_seconds=self._settings.drain_seconds)
        # Beside uvicorn's own wait for the connections, which are open as long as the engine serves them.
        drain = asyncio.create_task(self._engine.drain(self._settings.drain_seconds))
        await super().shutdown(sockets)
        # Done by now, or cut short by a second Ctrl-C.
        drain.cancel()
        await asyncio.gather(drain, return_exceptions=True)

    def _announce(self, model: LoadedModel) -> None:
        """The last line of the start: where the model is served, and a request to copy."""
        addresses = [address for server in self.servers for address in _addresses(server.sockets)]
        if addresses:
            # An address to be reached at, where the server listens on every one.
            api = addresses[0].replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:") + "/v1"
            has_template, needs_key = model.chat_template is not None, bool(self._settings.api_keys)
            request = example_request(api, is_chat=has_template, needs_key=needs_key)
            # In the message itself, which the console shows as it is.
            _log.info(f"serving {model.name} at {api}; try: {request}")

    async def _serve_unready(self, seconds: float) -> None:
        """Answer as before for a while, but for /ready, and close connections behind their answers; Ctrl-C ends it."""
        if seconds == 0:
            return
        _log.info("leaving: /ready is 503, requests are still taken", seconds=seconds)
        # Else a client could send its next request on a connection that is about to be closed.
        self.server_state.default_headers = [*self.server_state.default_headers, (b"connection", b"close")]
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.force_exit:  # noqa: ASYNC110 (uvicorn sets a plain flag)
            await asyncio.sleep(_POLL_SECONDS)


def serve(settings: ServerSettings) -> None:
    """Serve until SIGINT or SIGTERM, or until the engine has failed for good.

    Raises:
        ConfigError: the worker's endpoint is malformed.
        SystemExit: the address cannot be listened on, or the engine failed.
    """
    engine = make_engine(settings)
    configure_logging(level=settings.log_level, log_format=settings.log_format, in_background=True)
    if settings.worker is None:
        _log.info("starting", model=settings.model or "default")
    else:
        _log.info("starting", worker=settings.worker)
    if not (settings.api_keys or is_loopback(settings.host)):
        _log.warning(
            "no API key is needed, and other machines may reach this address: give --api-key, or listen on 127.0.0.1",
            host=settings.host,
        )
    server = DrainingServer(engine, settings)
    freeze_garbage_collector()
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again after it shut down
        server.run()
    if server.has_failed:
        raise SystemExit(1)


def make_engine(settings: ServerSettings) -> EngineClient:
    """A client of the worker named in the settings, else one with a worker process of its own."""
    timeouts = RequestTimeouts(first_token=settings.ttft_timeout, whole=settings.request_timeout)
    if settings.worker is not None:
        return remote_worker(
            settings.worker,
            max_waiting=settings.max_waiting,
            timeouts=timeouts,
            max_user_share=settings.max_user_share,
        )
    arguments = ("--log-level", settings.log_level, "--log-format", settings.log_format)
    return supervised_worker(
        settings.to_engine_config(),
        worker_arguments=arguments,
        timeouts=timeouts,
        max_user_share=settings.max_user_share,
        standby=settings.standby_worker,
    )


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def example_request(api: str, *, is_chat: bool, needs_key: bool) -> str:
    """A curl command that asks the model something.

    Args:
        api: base URL, with /v1.
        is_chat: whether the model has a chat template.
        needs_key: whether the server does.
    """
    endpoint, content = "completions", '"prompt": "Once upon a time"'
    if is_chat:
        endpoint, content = "chat/completions", '"messages": [{"role": "user", "content": "Hello!"}]'
    key = """ -H "Authorization: Bearer $CLLM_API_KEY\"""" if needs_key else ""
    return f"curl {api}/{endpoint}{key} -H 'Content-Type: application/json' -d '{{{content}}}'"


def _connection_limits(settings: ServerSettings) -> ConnectionLimits:
    most = raise_descriptor_limit()
    return ConnectionLimits(
        max_header_bytes=settings.max_header_bytes,
        header_timeout=settings.header_timeout,
        body_timeout=settings.body_timeout,
        send_timeout=settings.send_timeout,
        idle_timeout=_KEEP_ALIVE_SECONDS,
        max_connections=min(settings.max_connections or most, most),
        max_client_connections=settings.max_client_connections,
    )


def _addresses(sockets: Sequence[socket.socket]) -> list[str]:
    return [_url(listener.getsockname()) for listener in sockets if listener.family != socket.AF_UNIX]


def _url(name: tuple[str, int]) -> str:
    host, port = name[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
