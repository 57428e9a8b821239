"""`cllm models`, `cllm pull` and `cllm info` tell what there is, from the machine and from a server."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli import app
from tests.server.fakes import MODEL_NAME, ScriptedEngine
from tests.server.harness import running


def cllm(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache with one model."""
    snapshot = tmp_path / "hub" / "models--owner--tiny" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_bytes(b"{}" * 1024)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


@pytest.mark.usefixtures("hub_cache")
def test_built_in_and_cached_models_are_listed() -> None:
    lines = [json.loads(line) for line in cllm("models", "--json").splitlines()]
    places = {line["name"]: line["place"] for line in lines}
    assert places == {
        "cllm-chat": "built in",
        "cllm-chat-gated": "built in",
        "cllm-sql": "built in",
        "SmolLM2-135M-Instruct": "built in",
        "owner/tiny": "Hub cache",
    }
    assert cllm("models").splitlines()[0].split() == ["MODEL", "WHERE", "WHAT"]


@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize("suffix", ["", "/", "/v1"])
def test_a_server_is_asked_for_what_it_serves(suffix: str) -> None:
    with running(ScriptedEngine(), api_keys="secret") as server:
        server.shared_http.get("/health")
        listed = cllm("models", "--url", server.url + suffix, "--api-key", "secret")
        refused = CliRunner().invoke(app, ["models", "--url", server.url])
    assert MODEL_NAME in listed
    assert f"by {server.url}" in listed
    assert refused.exit_code == 2
    assert "401" in refused.stderr
    assert "check the address and --api-key" in refused.stderr


def test_a_server_that_does_not_answer_is_said_in_one_line() -> None:
    result = CliRunner().invoke(app, ["models", "--url", "http://127.0.0.1:9"])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)


def test_pull_prints_where_the_files_are(tiny_llama: Path) -> None:
    assert cllm("pull", str(tiny_llama)) == f"{tiny_llama}\n"


def test_pull_says_what_cannot_be_had(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["pull", str(tmp_path / "none")])
    assert result.exit_code == 2
    assert "no such file or folder" in result.stderr


def test_info_tells_architecture_memory_and_paths(tiny_llama: Path) -> None:
    lines = cllm("info", str(tiny_llama), "--dtype", "float32", "--num-cache-blocks", "8").splitlines()
    facts = dict(re.split(r"  +", line, maxsplit=1) for line in lines)
    assert facts["architecture"] == "LlamaForCausalLM"
    assert facts["computes in"] == "float32 on cpu"
    assert facts["KV cache"].endswith("GiB for 128 tokens")
    assert {"weights", "context", "block length", "attention", "layers", "output layer"} <= facts.keys()
