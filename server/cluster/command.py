"""`cllm deploy`: the app on a Ray cluster."""

import signal
import threading

import ray
import structlog
from ray import serve

from cllm_core.logs import configure_logging

from .deployment import build
from .settings import ClusterSettings

_log = structlog.stdlib.get_logger(__name__)


def deploy(settings: ClusterSettings) -> None:
    """Put the app on the cluster, or bring the one there up to date; on a cluster of our own, serve until SIGTERM.

    Raises:
        ConnectionError: there is no cluster at the address.
    """
    configure_logging(level=settings.log_level, log_format=settings.log_format)
    is_own = settings.address is None
    ray.init(
        address="local" if is_own else settings.address, log_to_driver=True, include_dashboard=False if is_own else None
    )
    serve.start(proxy_location="EveryNode", http_options={"host": settings.host, "port": settings.port})
    serve.run(build(settings.model_dump(mode="json", exclude_unset=True)), name=settings.app_name)
    _log.info("serving on the cluster", address=f"http://{settings.host}:{settings.port}", app=settings.app_name)
    if is_own:
        _wait_for_signal()
        serve.shutdown()
        ray.shutdown()


def _wait_for_signal() -> None:
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()
