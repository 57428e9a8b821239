"""Metrics tell where the time of requests went, how they ended and what was wrong with them, with bounded labels."""

import os
import time
from collections.abc import Mapping

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cllm_core.request import DecodingStats, RequestTimes
from server.http.record import FinishedOutput, RequestRecord
from server.ops.metrics import Metrics
from server.ops.vllm_names import VLLM_NAMES
from server.served_models import ModelRegistry
from server.settings import ServerSettings
from tests.server.fakes import MODEL_NAME, ScriptedEngine
from tests.server.harness import RunningServer, running, wait_until

CHAT: Mapping[str, object] = {"model": MODEL_NAME, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
PATH = "/v1/chat/completions"


def samples(server: RunningServer) -> dict[str, float]:
    """Values by series, written NAME{label=value,...} without the labels of the model."""
    return parsed(server.shared_http.get("/metrics").text)


def parsed(text: str) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model", "model_name", "engine")}
            found[sample.name + "".join(f"{{{k}={v}}}" for k, v in sorted(labels.items()))] = sample.value
    return found


def make_metrics() -> Metrics:
    engine = ScriptedEngine()
    return Metrics(engine, ModelRegistry(engine, ServerSettings()))


def test_a_choice_is_counted_once_with_its_end_lengths_and_times() -> None:
    metrics = make_metrics()
    times = RequestTimes(queue=0.25, prefill=0.5, decode=2.0)
    stats = DecodingStats(num_prompt_tokens=7, num_output_tokens=30, num_preemptions=2)
    metrics.observe_output(FinishedOutput(reason="length", seconds=3.0, stats=stats, times=times), model="m")
    found = parsed(metrics.render().decode())
    assert found["cllm_outputs_total{reason=length}"] == 1
    assert found["cllm_preemptions_total"] == 2
    assert found["cllm_prompt_length_tokens_sum"] == 7
    assert found["cllm_output_length_tokens_sum"] == 30
    sums = [found[f"cllm_{part}_seconds_sum"] for part in ("queue", "prefill", "decode", "generation")]
    assert sums == [0.25, 0.5, 2.0, 3.0]


def test_choices_that_end_by_themselves_or_with_their_client_are_told_apart() -> None:
    engine = ScriptedEngine(endless=True, step_seconds=0.02)
    with running(engine) as server:
        assert server.shared_http.post(PATH, json={**CHAT, "n": 2}).status_code == 200
        with server.http().stream("POST", PATH, json={**CHAT, "max_tokens": 400, "stream": True}) as answer:
            next(answer.iter_bytes())
        wait_until(lambda: samples(server).get("cllm_outputs_total{reason=abort}") == 1)
        found = samples(server)
    assert found["cllm_outputs_total{reason=length}"] == 2
    assert found["cllm_generation_seconds_count"] == 3


def test_rejected_fields_are_counted_by_their_outermost_name_and_bounded() -> None:
    with running(ScriptedEngine()) as server:
        server.shared_http.post(PATH, json={**CHAT, "temperature": -1})
        server.shared_http.post(PATH, json={**CHAT, "messages": [{"role": "user", "content": 5}]})
        found = samples(server)
    assert found["cllm_rejected_fields_total{field=temperature}"] == 1
    assert found["cllm_rejected_fields_total{field=messages}"] == 1
    metrics = make_metrics()
    for number in range(1000):
        record = RequestRecord(request_id="a", error_param=f"field{number}")
        metrics.observe_http(endpoint=PATH, status=400, record=record)
    labels = [name for name in parsed(metrics.render().decode()) if name.startswith("cllm_rejected_fields_total")]
    assert len(labels) == 101


def test_grammars_and_predictions_are_counted_by_outcome() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    with running(ScriptedEngine()) as server:
        for _ in range(2):
            server.shared_http.post(PATH, json={**CHAT, "response_format": form})
        server.shared_http.post(PATH, json={**CHAT, "structured_outputs": {"regex": "(["}})
        server.shared_http.post(PATH, json={**CHAT, "prediction": {"type": "content", "content": "never said"}})
        found = samples(server)
    outcomes = {o: found.get(f"cllm_grammars_total{{outcome={o}}}", 0) for o in ("compiled", "cached", "refused")}
    assert outcomes == {"compiled": 1, "cached": 1, "refused": 1}
    assert found["cllm_prediction_tokens_total{outcome=rejected}"] > 0


def test_the_event_loops_lag_is_measured() -> None:
    with running(ScriptedEngine()) as server:
        server.in_loop(lambda: time.sleep(0.3))
        wait_until(lambda: samples(server)["cllm_event_loop_lag_seconds_sum"] > 0.15)


def test_processes_connections_and_versions_are_described() -> None:
    with running(ScriptedEngine()) as server:
        found = samples(server)
    assert found["cllm_process_memory_bytes{process=server}"] > 10**7
    assert 0 < found["cllm_process_open_files{process=server}"] <= len(os.listdir("/proc/self/fd")) + 50
    assert found["cllm_connections"] == 1
    assert "cllm_process_memory_bytes{process=worker}" not in found  # the scripted engine has none
    assert [value for name, value in found.items() if name.startswith("cllm_build_info")] == [1.0]


def test_cut_connections_are_counted_by_reason() -> None:
    with running(ScriptedEngine(), max_header_bytes=1024) as server:
        assert server.shared_http.get("/health", headers={"a": "x" * 2000}).status_code == 431
        assert samples(server)["cllm_connections_cut_total{reason=headers_too_large}"] == 1


def test_every_series_has_the_same_values_under_vllms_name() -> None:
    with running(ScriptedEngine()) as server:
        server.shared_http.post(PATH, json=CHAT).raise_for_status()
        text = server.shared_http.get("/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for name, own in VLLM_NAMES.items():
        ours = [(s.name.removeprefix(own), s.value) for s in families[own].samples]
        theirs = [(s.name.removeprefix(name), s.value) for s in families[name].samples]
        assert theirs == ours, name
        assert all({"model_name", "engine"} <= s.labels.keys() for s in families[name].samples)
    assert families["vllm:request_success"].samples[0].labels["finished_reason"] == "length"
    [cache] = families["vllm:cache_config_info"].samples
    assert cache.labels["block_size"].isdecimal()
    [adapters] = families["vllm:lora_requests_info"].samples
    assert adapters.labels["running_lora_adapters"] == ""


@pytest.mark.parametrize("path", ["/nowhere", "/v1/models/made-up-name"])
def test_made_up_paths_and_models_make_no_series(path: str) -> None:
    with running(ScriptedEngine()) as server:
        server.shared_http.get(path)
        server.shared_http.post(PATH, json={**CHAT, "model": "made-up-name"})
        assert "made-up-name" not in server.shared_http.get("/metrics").text
