"""Renders docs/reference/metrics.md from what /metrics answers; `make docs` writes it, test_docs compares it."""

import sys

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from server.ops.metrics import Metrics
from server.served_models import ModelRegistry
from server.settings import ServerSettings
from tests.server.fakes import ScriptedEngine

HEADER = """\
# Metrics

Generated from `server/ops/metrics.py` by `make docs`; do not edit. `GET /metrics` answers in the Prometheus text
format, without an API key. Every series has the label `model`: the adapter's name, or the first name of the base for
its own requests and for what belongs to no single model.

A histogram `NAME` has the series `NAME_bucket`, `NAME_sum` and `NAME_count`.

| series | type | meaning |
| --- | --- | --- |
"""

FOOTER = """
Tokens per forward pass of all traffic are
`sum(rate(cllm_completion_tokens_total[5m])) / sum(rate(cllm_forward_passes_total[5m]))`. At 1 the drafts bring nothing:
the model is not a CLLM, or the task does not suit Jacobi decoding.
[Monitoring](../how-to/monitoring.md) has a dashboard and alerts on these series.
"""


def metric_families() -> list[Metric]:
    """Every family that a server has, with or without samples."""
    engine = ScriptedEngine()
    rendered = Metrics(engine, ModelRegistry(engine, ServerSettings())).render().decode()
    return list(text_string_to_metric_families(rendered))


def render_metrics_page() -> str:
    """The whole page, Markdown."""
    rows = [f"| `{series_name(family)}` | {family.type} | {family.documentation} |\n" for family in metric_families()]
    return "".join([HEADER, *rows, FOOTER])


def series_name(family: Metric) -> str:
    """As a query names it: counters end in _total."""
    return f"{family.name}_total" if family.type == "counter" else family.name


if __name__ == "__main__":
    sys.stdout.write(render_metrics_page())
