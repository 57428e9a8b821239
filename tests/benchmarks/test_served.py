"""The load tool and the whole comparison on real servers."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from tokenizers import Tokenizer

from benchmarks.served.measure import Plan, measure, run_load_process, token_counter
from benchmarks.served.plots import draw
from benchmarks.served.prompts import PromptSupply
from benchmarks.served.records import Answer, BenchmarkError, LoadJob
from benchmarks.served.report import Comparison
from benchmarks.served.servers import ServerSpec, _stop, running, version_of
from cllm_core.config import EngineConfig
from cllm_core.errors import ModelLoadError
from tests.benchmarks.factories import make_measured
from tests.server.fakes import ANSWER, MODEL_NAME, ScriptedEngine
from tests.server.harness import running as running_server


def run_load(url: str, **values: object) -> list[Answer]:
    """The answers to five prompts, two of them in flight."""
    fields: dict[str, object] = {
        "model": MODEL_NAME,
        "prompts": [f"Question {number}" for number in range(5)],
        "concurrency": 2,
        "max_tokens": 100,
        "stream_options": {"include_usage": True, "include_decoding_stats": True},
    }
    return run_load_process(LoadJob(url=url, **{**fields, **values}))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def answers() -> list[Answer]:
    """Of five prompts, two in flight."""
    with running_server(ScriptedEngine(step_seconds=0.02)) as server:
        return run_load(server.url)


def test_every_prompt_gets_one_answer_with_its_times_and_counts(answers: list[Answer]) -> None:
    assert sorted(answer.prompt for answer in answers) == list(range(5))
    for answer in answers:
        assert (answer.error, answer.text, answer.finish_reason) == (None, ANSWER, "stop")
        assert answer.num_tokens is not None
        assert answer.num_forward_passes is not None
        assert answer.first is not None
        assert answer.last is not None
        assert answer.started < answer.first < answer.last <= answer.finished
        assert answer.first_text not in ("", ANSWER)
        assert ANSWER.startswith(answer.first_text)


def test_only_so_many_requests_are_in_flight(answers: list[Answer]) -> None:
    for moment in (answer.started for answer in answers):
        assert sum(other.started <= moment < other.finished for other in answers) <= 2


def test_an_error_of_the_server_is_told_for_each_request() -> None:
    with running_server(ScriptedEngine()) as server:
        answers = run_load(server.url, model="another")
    assert len(answers) == 5
    assert all(answer.error is not None and "HTTP 404" in answer.error for answer in answers)


def test_a_server_that_is_not_there_is_an_error_of_each_request() -> None:
    answers = run_load("http://127.0.0.1:1")
    assert len(answers) == 5
    assert all(answer.error is not None and "refused" in answer.error for answer in answers)


def test_a_server_that_runs_already_is_asked_for_its_model() -> None:
    with (
        running_server(ScriptedEngine()) as server,
        running(ServerSpec(name="other", url=f"{server.url}/v1"), Path("unused")) as endpoint,
    ):
        assert (endpoint.url, endpoint.model) == (server.url, MODEL_NAME)


def test_a_server_that_ends_at_once_is_named_with_what_it_said(tmp_path: Path) -> None:
    spec = ServerSpec(name="broken", command=(sys.executable, "-c", "raise SystemExit('no such model')"))
    with (
        pytest.raises(BenchmarkError, match=r"broken: ended with code 1.*(?s:.)*no such model"),
        running(spec, tmp_path / "log"),
    ):
        pass


def test_what_outlives_a_server_ends_with_it() -> None:
    """Only a server that did not leave by itself was ended with its workers; one that left lost sight of them."""
    shell = ["sh", "-c", "sleep 60 & echo started; wait"]
    with subprocess.Popen(shell, stdout=subprocess.PIPE, start_new_session=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"started\n"
        _stop(server)
        assert server.returncode == -signal.SIGTERM
        server.communicate(timeout=10)  # returns when nobody is left who could write


def test_a_server_without_workers_is_stopped() -> None:
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as server:
        _stop(server)
        assert server.returncode == -signal.SIGTERM


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    spec = ServerSpec(name="missing", command=(str(tmp_path / "nowhere"),))
    with pytest.raises(BenchmarkError, match="missing: cannot be started"), running(spec, tmp_path / "log"):
        pass


@pytest.mark.parametrize(
    ("said", "version"),
    [("5.23.0", "5.23.0"), ("loading\nversion: 5432 (abc)\nbuilt with GNU", "5432 (abc)"), ("no idea", "unknown")],
)
def test_a_version_is_read_from_what_the_program_says(said: str, version: str) -> None:
    spec = ServerSpec(name="any", version_command=(sys.executable, "-c", f"print({said!r})"))
    assert version_of(spec) == version


def test_tokens_are_those_of_the_models_tokenizer(tiny_llama: Path) -> None:
    text = "Every token that the model predicts is checked."
    tokenizer = Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))
    count_tokens = token_counter(EngineConfig(model=str(tiny_llama)))
    assert count_tokens(text) == len(tokenizer.encode(text, add_special_tokens=False).ids) > 1
    assert count_tokens("") == 0


def test_a_model_without_tokenizer_is_refused_before_a_server_is_started(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    plan = Plan(
        servers=[ServerSpec(name="never started", command=("nowhere",))],
        engine=None,
        concurrencies=[1],
        num_requests=1,
        num_rounds=1,
        max_tokens=1,
        model=EngineConfig(model=str(tmp_path)),
        logs=tmp_path,
    )
    with pytest.raises(ModelLoadError):
        measure(plan, PromptSupply(["one"]), pytest.fail)


def test_plots_are_drawn(tmp_path: Path) -> None:
    draw([make_measured("a", 1, 1.0, 2.0), make_measured("a", 4, 3.0), make_measured("engine", 1, 2.0)], tmp_path)
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("throughput.png", "latency.png"))


@pytest.mark.slow
def test_the_whole_comparison_runs(tiny_llama: Path, tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out"
    prompts.write_text("".join(f'{{"prompt": "Count {number}"}}\n' for number in range(8)))
    options = ["--output", str(output), "--prompts", str(prompts), "--concurrency", "1,2", "--requests", "2"]
    small = ["--rounds", "1", "--max-tokens", "8", "--num-threads", "1"]
    command = [sys.executable, "-m", "benchmarks.served", str(tiny_llama), *options, *small]
    environment = {**os.environ, "CLLM_NUM_CACHE_BLOCKS": "64", "CLLM_DEVICE": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    comparison = msgspec.json.decode((output / "served.json").read_bytes(), type=Comparison)
    measured = {(one.server, one.concurrency): one for one in comparison.results}
    assert measured.keys() == {
        ("cllm AR", 1),
        ("cllm Jacobi", 1),
        ("engine alone", 1),
        ("cllm AR", 2),
        ("cllm Jacobi", 2),
    }
    assert all(one.same_text == 1.0 for one in comparison.results)
    assert measured["cllm AR", 1].rounds[0].tokens_per_forward == 1.0
    assert len(comparison.ratios) == 3
    assert str(tmp_path) not in (output / "served.md").read_text()
    assert (output / "latency.png").exists()
