"""One OpenTelemetry trace of each request, sent to a collector: the request with its parts in the engine below it.

Nothing happens while a request runs: its spans are made from its record when it has ended. Names and attributes are
those of OpenTelemetry's conventions for HTTP and for generative models. The packages are imported only where tracing is
on.
"""

import os
import time
from collections.abc import Iterator, Mapping

from starlette.datastructures import Headers
from starlette.types import Scope

from cllm_core import __version__
from cllm_core.errors import ConfigError

from ..http.record import FinishedOutput, RequestRecord

_NANOSECONDS = 1_000_000_000

_OPERATIONS: Mapping[str, str] = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
}


class Tracer:
    """Sends a trace of each request to a collector, in batches and from a thread of its own.

    Args:
        endpoint: base URL of a collector that takes OTLP over HTTP.

    Raises:
        ConfigError: the packages are not installed.
    """

    def __init__(self, endpoint: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
            from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
            from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
            from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"otlp_endpoint={endpoint}: {error}; install OpenTelemetry: pip install 'cllm-server[otel]'"
            ) from error
        named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "cllm-server"}
        self._provider = TracerProvider(resource=Resource.create({"service.version": __version__, **named}))
        exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("cllm_server", __version__)

    def __call__(self, scope: Scope, *, endpoint: str, status: int, record: RequestRecord) -> None:
        """See server.http.middleware.TraceRequest."""
        from opentelemetry import trace  # noqa: PLC0415
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

        parent = TraceContextTextMapPropagator().extract(dict(Headers(scope=scope)))
        ended = time.time_ns()
        began = ended - int(record.seconds * _NANOSECONDS)
        operation = _OPERATIONS.get(endpoint)
        name = f"{scope['method']} {endpoint}" if operation is None else f"{operation} {record.model}".strip()
        span = self._tracer.start_span(
            name,
            context=parent,
            kind=trace.SpanKind.SERVER,
            start_time=began,
            attributes=dict(_attributes(scope, endpoint, operation, status, record)),
        )
        if status >= 500:
            span.set_status(trace.StatusCode.ERROR)
        below = trace.set_span_in_context(span)
        for choice, output in enumerate(record.outputs):
            for part, start, end in _parts(output, began):
                child = self._tracer.start_span(
                    part, context=below, start_time=start, attributes={"cllm.choice": choice}
                )
                child.end(end)
        span.end(ended)

    def close(self) -> None:
        """Send what waits."""
        self._provider.shutdown()


def _attributes(
    scope: Scope, endpoint: str, operation: str | None, status: int, record: RequestRecord
) -> Iterator[tuple[str, str | int | float | list[str]]]:
    yield "http.request.method", scope["method"]
    yield "http.route", endpoint
    yield "http.response.status_code", status
    yield "cllm.request_id", record.request_id
    if scope["client"]:
        yield "client.address", scope["client"][0]
    if record.error is not None:
        yield "error.type", record.error
    if operation is None:
        return
    yield "gen_ai.operation.name", operation
    yield "gen_ai.response.model", record.model
    yield "gen_ai.usage.input_tokens", record.num_prompt_tokens
    yield "gen_ai.usage.output_tokens", record.num_completion_tokens
    yield "gen_ai.response.finish_reasons", [output.reason for output in record.outputs]
    yield "cllm.cached_tokens", record.num_cached_tokens
    yield "cllm.tokens_per_forward", record.tokens_per_forward


def _parts(output: FinishedOutput, began: int) -> Iterator[tuple[str, int, int]]:
    """Name, start and end in nanoseconds of the parts of a choice, counted back from its end."""
    if output.times is None:
        return
    end = began + int(output.seconds * _NANOSECONDS)
    times = output.times
    for part, seconds in (("decode", times.decode), ("prefill", times.prefill), ("queue", times.queue)):
        start = end - int(seconds * _NANOSECONDS)
        yield part, start, end
        end = start
