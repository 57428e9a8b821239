"""Prometheus metrics of one app, in a registry of its own.

Counters and histograms are fed by the server; the state of engine and processes is read when somebody scrapes.
"""

from http import HTTPStatus

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from cllm_core.worker.engine_client import EngineClient
from cllm_core.worker.messages import StepReport

from ..http.connections import Connections
from ..http.record import FinishedOutput, RequestRecord
from ..served_models import ModelRegistry
from .engine_metrics import EngineCollector, ProcessCollector
from .vllm_names import VllmCollector

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_ACCEPTED = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64, 128, 256)
_LENGTHS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
_STEPS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_LAGS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
_TPF = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0, 16.0, 32.0)


# Names that a rejected field may bring as a label: clients could make up any number of them.
_MAX_FIELD_LABELS = 100
_OTHER = "other"


class Metrics:
    """All metrics of one app.

    Label `model` is the name of the adapter that decoded, else the base's first; empty while none is loaded.
    """

    def __init__(self, engine: EngineClient, models: ModelRegistry) -> None:
        self._registry = CollectorRegistry()
        self._vllm_registry = CollectorRegistry()
        self._vllm_registry.register(VllmCollector(self._registry, engine, models))
        self._models = models
        self._processes = ProcessCollector(engine)
        self._registry.register(EngineCollector(engine, models))
        self._registry.register(self._processes)
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
        self._rejected = self._counter(
            "cllm_rejected_fields", "Requests answered with 400, by the field at fault.", "field"
        )
        self._outputs = self._counter(
            "cllm_outputs", "Choices that ended, by reason; abort: the client left.", "reason"
        )
        self._preemptions = self._counter("cllm_preemptions", "Times that requests lost their cache blocks to others.")
        self._grammars = self._counter(
            "cllm_grammars", "Grammars of requests: cached, compiled, refused, slow or busy.", "outcome"
        )
        self._predictions = self._counter(
            "cllm_prediction_tokens", "Tokens of predicted outputs, accepted or rejected.", "outcome"
        )
        self._generation = self._histogram(
            "cllm_generation_seconds", "Time from a request's arrival to the end of a choice.", _SECONDS
        )
        self._queue = self._histogram("cllm_queue_seconds", "Time of a choice in the queue.", _SECONDS)
        self._prefill = self._histogram(
            "cllm_prefill_seconds", "Time from there to the first token of a choice.", _SECONDS
        )
        self._decode = self._histogram("cllm_decode_seconds", "Time from there to its last token.", _SECONDS)
        self._prompt_length = self._histogram("cllm_prompt_length_tokens", "Prompt tokens of a choice.", _LENGTHS)
        self._output_length = self._histogram("cllm_output_length_tokens", "Output tokens of a choice.", _LENGTHS)
        self._steps = self._histogram("cllm_engine_step_seconds", "Durations of engine steps.", _STEPS)
        self._lag = Histogram(
            "cllm_event_loop_lag_seconds",
            "Time by which the event loop was late, sampled ten times a second.",
            buckets=_LAGS,
            registry=self._registry,
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
        self._rejected_labels: set[str] = set()

    def render(self) -> bytes:
        """The Prometheus text format: our series, then the same under vLLM's names."""
        return generate_latest(self._registry) + generate_latest(self._vllm_registry)

    def watch_connections(self, connections: Connections) -> None:
        """Report these connections."""
        self._processes.watch(connections)

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
        if status == HTTPStatus.BAD_REQUEST and record.error_param:
            self._rejected.labels(name, self._rejected_label(record.error_param)).inc()
        if record.num_forward_passes:
            self._tpf.labels(name).observe(record.tokens_per_forward)

    def observe_output(self, output: FinishedOutput, *, model: str) -> None:
        """Count a choice that has ended."""
        self._outputs.labels(model, output.reason).inc()
        self._preemptions.labels(model).inc(output.stats.num_preemptions)
        self._generation.labels(model).observe(output.seconds)
        self._prompt_length.labels(model).observe(output.stats.num_prompt_tokens)
        self._output_length.labels(model).observe(output.stats.num_output_tokens)
        if output.times is not None:
            self._queue.labels(model).observe(output.times.queue)
            self._prefill.labels(model).observe(output.times.prefill)
            self._decode.labels(model).observe(output.times.decode)

    def observe_prediction(self, *, num_accepted: int, num_rejected: int, model: str) -> None:
        """Count the tokens of a predicted output."""
        self._predictions.labels(model, "accepted").inc(num_accepted)
        self._predictions.labels(model, "rejected").inc(num_rejected)

    def observe_grammar(self, outcome: str) -> None:
        """Count a check of a request's grammar."""
        self._grammars.labels(self._models.name_or_empty, outcome).inc()

    def observe_loop_lag(self, seconds: float) -> None:
        """Time by which the event loop was late."""
        self._lag.observe(seconds)

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
            self._steps.labels(base).observe(step.step_seconds)
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

    def _rejected_label(self, param: str) -> str:
        """The outermost field, as long as there are not too many of them."""
        label = param.split(".", maxsplit=1)[0].split("[", maxsplit=1)[0]
        if label not in self._rejected_labels:
            if len(self._rejected_labels) >= _MAX_FIELD_LABELS:
                return _OTHER
            self._rejected_labels.add(label)
        return label

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, ("model", *labels), registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, text, ("model", *labels), buckets=buckets, registry=self._registry)
