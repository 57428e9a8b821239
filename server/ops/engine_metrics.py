"""Metrics that are read at the moment of the scrape, so that no gauge is ever stale: engine, processes, connections."""

import os
import platform
from collections.abc import Iterable, Mapping

import psutil
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cllm_core import __version__
from cllm_core.logs import num_dropped_records
from cllm_core.worker.engine_client import EngineClient

from ..http.connections import Connections
from ..served_models import ModelRegistry


class EngineCollector(Collector):
    """Reads the engine."""

    def __init__(self, engine: EngineClient, models: ModelRegistry) -> None:
        self._engine = engine
        self._models = models

    def collect(self) -> Iterable[Metric]:
        """All series, with the label `model`."""
        status, stats = self._engine.status, self._engine.stats
        used = stats.num_cache_blocks - stats.num_free_blocks
        yield self._gauge("cllm_ready", "1 while requests are accepted.", float(status.state == "ready"))
        yield self._gauge("cllm_requests_running", "Requests being decoded.", stats.num_running)
        yield self._gauge("cllm_requests_waiting", "Requests in the queue.", stats.num_waiting)
        yield self._gauge("cllm_cache_blocks", "Blocks of the KV cache.", stats.num_cache_blocks)
        yield self._gauge("cllm_cache_blocks_used", "Blocks that running requests hold.", used)
        yield self._gauge(
            "cllm_cache_usage_ratio", "Share of the KV cache in use.", used / max(stats.num_cache_blocks, 1)
        )
        yield self._gauge("cllm_step_seconds", "Duration of the latest engine step.", stats.step_seconds)
        yield self._counter("cllm_engine_steps", "Engine steps since the worker started.", stats.num_steps)
        yield self._counter("cllm_worker_restarts", "Times the worker was restarted.", status.num_restarts)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        return _with_sample(GaugeMetricFamily(name, text, labels=["model"]), [self._models.name_or_empty], value)

    def _counter(self, name: str, text: str, value: float) -> Metric:
        return _with_sample(CounterMetricFamily(name, text, labels=["model"]), [self._models.name_or_empty], value)


class ProcessCollector(Collector):
    """Reads the server's process and its worker's, its connections and its log."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._connections: Connections | None = None

    def watch(self, connections: Connections) -> None:
        """Read these connections from now on."""
        self._connections = connections

    def collect(self) -> Iterable[Metric]:
        """All series."""
        memory = GaugeMetricFamily("cllm_process_memory_bytes", "Resident memory, by process.", labels=["process"])
        files = GaugeMetricFamily("cllm_process_open_files", "Open descriptors, by process.", labels=["process"])
        for name, pid in {"server": os.getpid(), "worker": self._engine.worker_pid}.items():
            for family, value in _figures(memory, files, pid):
                family.add_metric([name], value)
        yield memory
        yield files
        yield GaugeMetricFamily("cllm_connections", "Open HTTP connections.", value=self._num_open)
        cut = CounterMetricFamily("cllm_connections_cut", "Connections refused or cut, by reason.", labels=["reason"])
        for reason, count in self._cut.items():
            cut.add_metric([reason], count)
        yield cut
        yield CounterMetricFamily(
            "cllm_log_records_dropped", "Log records dropped since too many waited.", value=num_dropped_records()
        )
        build = GaugeMetricFamily("cllm_build_info", "Versions; the value is 1.", labels=["version", "python"])
        yield _with_sample(build, [__version__, platform.python_version()], 1.0)

    @property
    def _num_open(self) -> int:
        return 0 if self._connections is None else self._connections.num_open

    @property
    def _cut(self) -> Mapping[str, int]:
        return {} if self._connections is None else dict(self._connections.num_cut)


def _figures(memory: Metric, files: Metric, pid: int | None) -> list[tuple[GaugeMetricFamily, float]]:
    if pid is None:
        return []
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            return [(memory, process.memory_info().rss), (files, process.num_fds())]  # type: ignore[list-item]
    except psutil.Error:  # it ended meanwhile
        return []


def _with_sample(family: GaugeMetricFamily | CounterMetricFamily, labels: list[str], value: float) -> Metric:
    family.add_metric(labels, value)
    return family
