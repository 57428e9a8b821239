"""Each request becomes a trace at an OpenTelemetry collector, below the span that its client names."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from tests.server.fakes import MODEL_NAME, ScriptedEngine
from tests.server.harness import running

pytest.importorskip("opentelemetry.sdk")
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CHAT = {"model": MODEL_NAME, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}


class Collector(HTTPServer):
    """Takes traces over HTTP."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans: list[Span] = []
        self.resources: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
        for group in request.resource_spans:
            self.server.resources.append({a.key: a.value.string_value for a in group.resource.attributes})
            self.server.spans += [span for scope in group.scope_spans for span in scope.spans]
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def values(span: Span) -> dict[str, object]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


def test_a_chat_is_a_trace_below_its_clients_span_with_the_parts_in_the_engine(collector: Collector) -> None:
    parent = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
    with running(ScriptedEngine(), otlp_endpoint=collector.url) as server:
        server.shared_http.post("/v1/chat/completions", json={**CHAT, "n": 2}, headers=parent).raise_for_status()
        server.shared_http.get("/health")
    [root] = [span for span in collector.spans if span.parent_span_id.hex() == PARENT_ID]
    assert (root.trace_id.hex(), root.name, root.kind) == (TRACE_ID, f"chat {MODEL_NAME}", Span.SPAN_KIND_SERVER)
    found = values(root)
    assert (found["gen_ai.operation.name"], found["http.response.status_code"]) == ("chat", 200)
    assert (found["gen_ai.usage.output_tokens"], found["gen_ai.response.model"]) == (8, MODEL_NAME)
    children = [span for span in collector.spans if span.parent_span_id == root.span_id]
    assert sorted(span.name for span in children) == ["decode", "decode", "prefill", "prefill", "queue", "queue"]
    assert all(root.start_time_unix_nano <= s.start_time_unix_nano <= s.end_time_unix_nano for s in children)
    assert len(collector.spans) == 7  # probes are not traced
    assert collector.resources[0]["service.name"] == "cllm-server"


def test_errors_are_named_and_other_endpoints_traced_by_their_routes(collector: Collector) -> None:
    with running(ScriptedEngine(), otlp_endpoint=collector.url) as server:
        server.shared_http.post("/v1/chat/completions", json={**CHAT, "temperature": -1})
        server.shared_http.get("/v1/models/made-up")
    by_name = {span.name: values(span) for span in collector.spans}
    assert by_name["chat"]["error.type"] == "invalid_value"
    assert by_name["GET /v1/models/{name:path}"]["http.response.status_code"] == 404


def test_what_an_unsampled_client_sends_is_not_traced(collector: Collector) -> None:
    unsampled = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-00"}
    with running(ScriptedEngine(), otlp_endpoint=collector.url) as server:
        server.shared_http.post("/v1/chat/completions", json=CHAT, headers=unsampled).raise_for_status()
    assert collector.spans == []


def test_nothing_of_it_is_imported_unless_it_is_on() -> None:
    # FastAPI looks for the API, which does nothing by itself.
    program = """
import sys
from server.app import create_app
from server.settings import ServerSettings
from tests.server.fakes import ScriptedEngine
create_app(ScriptedEngine(), ServerSettings())
assert not [name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))]
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)
