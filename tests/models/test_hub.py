"""Fetching from a Hub of our own on this machine: what is downloaded, what is reported, and what each refusal says."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec
import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORIES = {
    "owner/safe": [
        "config.json",
        "tokenizer.model",
        "additional_chat_templates/tool_use.jinja",
        "chat_template.jinja",
        "cllm.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "consolidated.safetensors",
        "pytorch_model.bin",
        "modeling_own.py",
        "onnx/model.safetensors",
        "README.md",
    ],
    "owner/legacy": ["config.json", "pytorch_model.bin", "training.log"],
}
SCRIPT = """
import json, sys
from cllm_core.errors import ModelLoadError
from cllm_core.models.hub import fetch
repo_id, revision, with_code = json.loads(sys.argv[1])
seen = []
try:
    folder = fetch(repo_id, revision=revision, with_code=with_code, on_progress=lambda *step: seen.append(step))
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    print(json.dumps({"files": files, "progress": seen}))
except ModelLoadError as error:
    print(json.dumps({"error": str(error)}))
"""


class Fetched(msgspec.Struct):
    """What a fetch in a process of its own came to."""

    files: list[str] = []
    progress: list[tuple[str, float]] = []
    error: str = ""


class FakeHub(BaseHTTPRequestHandler):
    """The few answers of the Hub's API that a download needs; every file holds its own name."""

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        status, headers, body = self._respond(self.path.partition("?")[0].strip("/").split("/"))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def _respond(self, parts: list[str]) -> tuple[int, dict[str, str], bytes]:
        if parts[:2] == ["api", "models"]:
            repo_id, what, revision = "/".join(parts[2:4]), parts[4], parts[5]
        else:
            repo_id, what, revision = "/".join(parts[:2]), parts[2], parts[3]
        if repo_id == "owner/gated":
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        if repo_id not in REPOSITORIES:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if revision not in {"main", COMMIT}:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        files = REPOSITORIES[repo_id]
        if what == "revision":
            return 200, {}, json.dumps({"id": repo_id, "sha": COMMIT}).encode()
        if what == "tree":
            tree = [{"type": "file", "path": f, "size": len(f), "oid": f.encode().hex()} for f in files]
            return 200, {}, json.dumps(tree).encode()
        name = "/".join(parts[4:])
        return 200, {"ETag": f'"{name.encode().hex()}"', "X-Repo-Commit": COMMIT}, name.encode()

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


class Hub:
    """A Hub on this machine and a cache for it."""

    def __init__(self, cache: Path) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{self._server.server_port}",
            "HF_HOME": str(cache),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }
        self._thread.start()

    def fetch(self, repo_id: str, *, revision: str | None = None, with_code: bool = False, offline: int = 0) -> Fetched:
        """Fetch in a new process, since the Hub's client reads its settings at import."""
        result = subprocess.run(
            [sys.executable, "-c", SCRIPT, json.dumps([repo_id, revision, with_code])],
            env={**self._environment, "HF_HUB_OFFLINE": str(offline)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert result.stderr == ""
        return msgspec.json.decode(result.stdout, type=Fetched)

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    hub = Hub(tmp_path)
    yield hub
    hub.close()


def test_only_files_that_loading_needs_are_fetched(hub: Hub) -> None:
    fetched = hub.fetch("owner/safe")
    assert fetched.files == [
        "additional_chat_templates/tool_use.jinja",
        "chat_template.jinja",
        "cllm.json",
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "tokenizer.model",
    ]
    assert fetched.progress[0] == ("fetching owner/safe", 0.0)
    assert fetched.progress[-1] == ("fetching owner/safe", 1.0)


def test_code_is_fetched_only_on_request(hub: Hub) -> None:
    assert "modeling_own.py" in hub.fetch("owner/safe", with_code=True).files


def test_legacy_weights_are_fetched_where_there_are_no_safetensors(hub: Hub) -> None:
    assert hub.fetch("owner/legacy").files == ["config.json", "pytorch_model.bin"]


def test_cached_copy_serves_without_a_network(hub: Hub) -> None:
    online = hub.fetch("owner/legacy")
    assert hub.fetch("owner/legacy", offline=1).files == online.files
    assert "the Hub cannot be asked" in hub.fetch("owner/safe", offline=1).error


@pytest.mark.parametrize(
    ("repo_id", "revision", "message"),
    [
        ("owner/gated", None, "owner/gated: access is restricted; accept its terms"),
        ("owner/none", None, "owner/none: neither a local path nor a repository of the Hub; check the spelling"),
        ("owner/safe", "v9", "owner/safe@v9: the repository has no such revision"),
    ],
)
def test_refusal_names_the_cause_and_a_remedy(hub: Hub, repo_id: str, revision: str | None, message: str) -> None:
    assert message in hub.fetch(repo_id, revision=revision).error
