"""Renders docs/reference/metrics.md from what /metrics answers; `make docs` writes it, test_docs compares it."""

import sys

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from server.ops.metrics import Metrics
from server.ops.vllm_names import VLLM_NAMES
from server.served_models import ModelRegistry
from server.settings import ServerSettings
from tests.server.fakes import ScriptedEngine

HEADER = """\
# Metrics

Generated from `server/ops/metrics.py` by `make docs`; do not edit. `GET /metrics` answers in the Prometheus text
format, without an API key. Series of requests and of the engine have the label `model`: the adapter's name, or the
first name of the base for its own requests and for what belongs to no single model.

A histogram `NAME` has the series `NAME_bucket`, `NAME_sum` and `NAME_count`.

| series | type | meaning |
| --- | --- | --- |
"""

VLLM_HEADER = """
## vLLM's names

The same series once more under the names that [vLLM](https://docs.vllm.ai) gives them, with its labels `model_name` and
`engine`, for dashboards, autoscalers and gateways made for its servers.

| series | as |
| --- | --- |
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
    metrics = Metrics(engine, ModelRegistry(engine, ServerSettings()))
    families = text_string_to_metric_families(metrics.render().decode())
    own = [family for family in families if family.name.startswith("cllm_")]
    return [family for family in own if not family.name.endswith("_created")]


def render_metrics_page() -> str:
    """The whole page, Markdown."""
    rows = [f"| `{series_name(family)}` | {family.type} | {family.documentation} |\n" for family in metric_families()]
    own = {family.name: series_name(family) for family in metric_families()}
    named = [f"| `{name}{own[of].removeprefix(of)}` | `{own[of]}` |\n" for name, of in VLLM_NAMES.items()]
    return "".join([HEADER, *rows, VLLM_HEADER, *named, FOOTER])


def series_name(family: Metric) -> str:
    """As a query names it: counters end in _total."""
    return f"{family.name}_total" if family.type == "counter" else family.name


if __name__ == "__main__":
    sys.stdout.write(render_metrics_page())
