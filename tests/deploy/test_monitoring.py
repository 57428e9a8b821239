"""The alert rules and the dashboard speak of series, labels and states that servers really have."""

import json
import math
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.metrics_page import metric_families, series_name
from tests.server.fakes import MODEL_NAME, ScriptedEngine
from tests.server.harness import RunningServer, running, wait_until

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "deploy" / "monitoring"
DASHBOARD = MONITORING / "grafana" / "dashboards" / "cllm.json"
OF_SCRAPES = {"job", "instance", "le"}
"""Labels that Prometheus adds, and the one of histograms' buckets."""
MAY_BE_EMPTY = {"Ignored fields"}
"""Panels of what a healthy server without odd clients does not count."""


def dashboard_queries() -> list[tuple[str, str]]:
    """Title and query of every panel, and the queries of the variables."""
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    panels = [(panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel.get("targets", ())]
    return panels + [(variable["name"], variable["definition"]) for variable in dashboard["templating"]["list"]]


def alert_queries() -> list[tuple[str, str]]:
    """Name and condition of every alert."""
    groups = yaml.safe_load((MONITORING / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    return [(rule["alert"], rule["expr"]) for group in groups for rule in group["rules"]]


QUERIES = [*dashboard_queries(), *alert_queries()]


@pytest.fixture(scope="module")
def labels() -> dict[str, set[str]]:
    """Labels of each series of a server that has answered, refused and ignored something."""
    with running(ScriptedEngine()) as server:
        serve_everything(server)
        families = text_string_to_metric_families(server.shared_http.get("/metrics").text)
        return {sample.name: set(sample.labels) for family in families for sample in family.samples}


def serve_everything(server: RunningServer) -> None:
    """Requests that leave a sample of every series."""
    body = {"model": MODEL_NAME, "messages": [{"role": "user", "content": "hello"}], "made_up": 1}
    server.shared_http.post("/v1/chat/completions", json=body).raise_for_status()
    assert server.shared_http.post("/v1/chat/completions", json={}).status_code == 400
    predicted = {"prediction": {"type": "content", "content": "Hello"}}
    server.shared_http.post("/v1/chat/completions", json=body | predicted).raise_for_status()
    formed = {"response_format": {"type": "json_object"}}
    server.shared_http.post("/v1/chat/completions", json=body | formed).raise_for_status()
    assert server.shared_http.get("/health", headers={"x": "x" * 40_000}).status_code == 431


@pytest.mark.parametrize(("title", "query"), QUERIES, ids=[title for title, _ in QUERIES])
def test_every_series_and_label_of_a_query_exists(labels: dict[str, set[str]], title: str, query: str) -> None:
    named = set(re.findall(r"\b(?:cllm_\w+|up)\b", query))
    assert named
    assert named - labels.keys() <= {"up"}, title
    used = set(re.findall(r"[{,]\s*(\w+)\s*=[~!]?", query))
    used |= {label for group in re.findall(r"by \(([^)]*)\)", query) for label in re.split(r",\s*", group)}
    assert used <= OF_SCRAPES.union(*(labels.get(name, set()) for name in named)), title


def test_the_dashboard_shows_every_series() -> None:
    shown = set(re.findall(r"\bcllm_\w+", " ".join(query for _, query in dashboard_queries())))
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    counted_by_ratio = {"cllm_cache_blocks", "cllm_cache_blocks_used"}
    assert {series_name(family) for family in metric_families()} - shown == counted_by_ratio


def test_every_panel_has_a_place_and_a_description() -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    taken = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(taken) == len(set(taken))
    assert all(x < 24 for x, _ in taken)
    assert all(panel["description"] for panel in panels)


def test_every_alert_has_a_test_and_a_line_in_the_documentation() -> None:
    groups = yaml.safe_load((MONITORING / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    healthy, faulty = yaml.safe_load((MONITORING / "alerts_test.yml").read_text(encoding="utf-8"))["tests"]
    names = {rule["alert"] for rule in rules}
    assert {test["alertname"] for test in healthy["alert_rule_test"]} == names
    assert {test["alertname"] for test in faulty["alert_rule_test"] if test["exp_alerts"]} == names
    assert all(rule["annotations"].keys() == {"summary", "description"} for rule in rules)
    page = (ROOT / "docs" / "how-to" / "monitoring.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `(\w+)` \| (\w+)", page, re.MULTILINE))
    assert documented == {(rule["alert"], rule["labels"]["severity"]) for rule in rules}
    flags = re.findall(r"--[a-z-]+", (MONITORING / "alerts.yml").read_text(encoding="utf-8"))
    settings = (ROOT / "docs" / "reference" / "settings.md").read_text(encoding="utf-8")
    assert [flag for flag in flags if f"`{flag}`" not in settings] == []


@pytest.mark.parametrize("command", [["check", "config", "prometheus.yml"], ["test", "rules", "alerts_test.yml"]])
def test_promtool_accepts_the_configuration_and_the_alerts_fire(command: list[str]) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian's package prometheus has it)")
    done = subprocess.run(["promtool", *command], cwd=MONITORING, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_mounts_what_there_is() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    monitoring = {name: service for name, service in services.items() if "monitoring" in service["profiles"]}
    assert monitoring.keys() == {"prometheus", "grafana"}
    for service in monitoring.values():
        mounted = [volume.split(":") for volume in service["volumes"] if volume.startswith("./")]
        assert mounted
        assert all((ROOT / source).exists() and mode == "ro" for source, _, mode in mounted)
        assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", service["image"])
        assert re.fullmatch(r"\$\{\w+:-127\.0\.0\.1:\d+\}:\d+", service["ports"][0])
    scraped = yaml.safe_load((MONITORING / "prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"]
    (discovery,) = scraped[0]["dns_sd_configs"]
    assert set(discovery["names"]) == services.keys() - monitoring.keys()


@pytest.mark.slow
def test_prometheus_answers_every_query_of_the_dashboard(tmp_path: Path) -> None:
    """Prometheus scrapes a server under load; no panel stays empty and no alert is pending."""
    if shutil.which("prometheus") is None:
        pytest.skip("Prometheus is not installed (Debian's package prometheus)")
    with running(ScriptedEngine()) as server, prometheus_of(server, tmp_path) as api:
        for _ in range(8):
            serve_everything(server)
            time.sleep(1)
        for title, query in dashboard_queries():
            if "label_values" in query:
                continue
            expression = query.replace("$__rate_interval", "5s").replace("$model", ".*").replace("$instance", ".*")
            answer = api.get("/api/v1/query", params={"query": expression}).json()
            assert answer["status"] == "success", answer
            values = [float(row["value"][1]) for row in answer["data"]["result"]]
            assert values or title in MAY_BE_EMPTY, f"{title}: {expression}"
            assert not any(map(math.isnan, values)), f"{title}: not a number: {expression}"
        alerts = api.get("/api/v1/rules").json()["data"]["groups"][0]["rules"]
        assert {rule["name"] for rule in alerts} == {name for name, _ in alert_queries()}
        assert [rule["name"] for rule in alerts if rule["health"] != "ok" or rule["alerts"]] == []


@contextmanager
def prometheus_of(server: RunningServer, folder: Path) -> Iterator[httpx.Client]:
    """Prometheus with this project's rules, scraping the server every second."""
    target = server.url.removeprefix("http://")
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(MONITORING / "alerts.yml")],
        "scrape_configs": [{"job_name": "cllm", "static_configs": [{"targets": [target]}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [
        "prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(command, stdout=log, stderr=log) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as api,
    ):
        try:
            wait_until(lambda: answers(api, "/-/ready"), seconds=30)
            yield api
        finally:
            process.terminate()
            process.wait(timeout=30)


def answers(api: httpx.Client, path: str) -> bool:
    """Whether a server is up."""
    try:
        return api.get(path).status_code == 200
    except httpx.TransportError:
        return False
