"""Prometheus metrics of one app, in a registry of its own.

Counters and histograms are fed by the server; the engine's state is read when somebody scrapes.
"""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cllm_core.worker.engine_client import EngineClient
from cllm_core.worker.messages import StepReport

from ..http.record import RequestRecord
from ..served_models import ModelRegistry

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_ACCEPTED = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64, 128, 256)
_TPF = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0, 16.0, 32.0)


class Metrics:
    """All metrics of one app.

    Label `model` is the name of the adapter that decoded, else the base's first; empty while none is loaded.
    """

    def __init__(self, engine: EngineClient, models: ModelRegistry) -> None:
        self._registry = CollectorRegistry()
        self._models = models
        self._registry.register(_EngineCollector(engine, models))
        self._requests = self._counter(
            "cllm_requests", "HTTP requests by endpoint and status; 499 is a client that left.", "endpoint", "status"
        )
        self._prompt_tokens = self._counter("cllm_prompt_tokens", "Prompt tokens of all requests.")
        self._cached_tokens = self._counter("cllm_cached_prompt_tokens", "Prompt tokens from the prefix cache.")
        self._completion_tokens = self._counter("cllm_completion_tokens", "Tokens sent to clients.")
        self._forward_passes = self._counter("cllm_forward_passes", "Jacobi iterations, summed over requests.")
        self._ignored = self._counter(
            "cllm_ignored_fields", "Requests with a field that has no effect, by field; other: unknown ones.", "field"
        )
        self._latency = self._histogram(
            "cllm_request_seconds", "Time to the whole answer, by endpoint.", _SECONDS, "endpoint"
        )
        self._ttft = self._histogram(
            "cllm_time_to_first_token_seconds",
            "Time from a request's arrival to the first token of a choice.",
            _SECONDS,
        )
        self._gap = self._histogram(
            "cllm_inter_chunk_seconds", "Time between two chunks of a choice, as a streaming client sees it.", _GAPS
        )
        self._tpf = self._histogram(
            "cllm_request_tokens_per_forward", "Tokens per forward pass of finished requests.", _TPF
        )
        self._accepted = self._histogram(
            "cllm_accepted_tokens_per_iteration", "Tokens that one Jacobi iteration accepted.", _ACCEPTED
        )
        # By model: the two series of a step's rows, whose look-up would cost more than counting.
        self._step_series: dict[str, tuple[Counter, Histogram]] = {}

    def render(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self._registry)

    def observe_http(self, *, endpoint: str, status: int, record: RequestRecord) -> None:
        """Count a request that has its whole answer."""
        name = record.model or self._models.name_or_empty
        self._requests.labels(name, endpoint, str(status)).inc()
        self._latency.labels(name, endpoint).observe(record.seconds)
        self._prompt_tokens.labels(name).inc(record.num_prompt_tokens)
        self._cached_tokens.labels(name).inc(record.num_cached_tokens)
        self._completion_tokens.labels(name).inc(record.num_completion_tokens)
        for label in record.ignored.labels.values():
            self._ignored.labels(name, label).inc()
        if record.num_forward_passes:
            self._tpf.labels(name).observe(record.tokens_per_forward)

    def observe_first_token(self, seconds: float, *, model: str) -> None:
        """Time from the request's arrival to the first token of one of its choices."""
        self._ttft.labels(model).observe(seconds)

    def observe_gap(self, seconds: float, *, model: str) -> None:
        """Time between two chunks of one choice."""
        self._gap.labels(model).observe(seconds)

    def observe_step(self, report: StepReport) -> None:
        """Count what engine steps accepted; a step listener of the engine."""
        base = self._models.name_or_empty
        for step in report.steps:
            adapters = step.adapter_per_row or ("",) * len(step.accepted_per_row)
            for num_tokens, adapter in zip(step.accepted_per_row, adapters, strict=True):
                passes, accepted = self._series_of(adapter or base)
                passes.inc()
                accepted.observe(num_tokens)

    def _series_of(self, model: str) -> tuple[Counter, Histogram]:
        series = self._step_series.get(model)
        if series is None:
            series = self._forward_passes.labels(model), self._accepted.labels(model)
            self._step_series[model] = series
        return series

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, ("model", *labels), registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, text, ("model", *labels), buckets=buckets, registry=self._registry)


class _EngineCollector(Collector):
    """Reads the engine at the moment of the scrape, so that no gauge is ever stale."""

    def __init__(self, engine: EngineClient, models: ModelRegistry) -> None:
        self._engine = engine
        self._models = models

    def collect(self) -> Iterable[Metric]:
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
        family = GaugeMetricFamily(name, text, labels=["model"])
        family.add_metric([self._models.name_or_empty], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=["model"])
        family.add_metric([self._models.name_or_empty], value)
        return family
