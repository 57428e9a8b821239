"""Coding agents of other makers, run from the command line in a folder with a note: they read it and write another."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.clients.agent_engine import Calls, by_turns
from tests.clients.harness import NODE, needs, needs_node, node_program, program, run
from tests.server.harness import RunningServer

pytestmark = pytest.mark.clients

ANSWER = "The note says hello; I have said goodbye."
AGENTS_FOLDER = NODE / "agents"
QUESTION = "What does note.txt say? Write goodbye to reply.txt."


@dataclass(frozen=True)
class Workplace:
    """Folders of one run and the server to use: nothing of the user's own is read or written."""

    home: Path
    project: Path
    base_url: str

    @property
    def note(self) -> str:
        return str(self.project / "note.txt")

    @property
    def reply(self) -> str:
        return str(self.project / "reply.txt")

    def write(self, path: str, text: str) -> None:
        """Write a file of the home folder."""
        file = self.home / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def run(self, *command: str | Path, **environment: str) -> str:
        """Standard output of a client that works here."""
        own = {"HOME": str(self.home), "XDG_CONFIG_HOME": "", "XDG_DATA_HOME": "", "OPENAI_API_KEY": "none"}
        return run(*command, folder=self.project, PWD=str(self.project), **own, **environment)


@pytest.fixture
def workplace(agent_server: RunningServer, tmp_path: Path) -> Workplace:
    home, project = tmp_path / "home", tmp_path / "project"
    home.mkdir()
    project.mkdir()
    (project / "note.txt").write_text("hello\n")
    (project / "answer.py").write_text("def answer():\n    return 1\n")
    identity = ["-c", "user.name=Me", "-c", "user.email=me@example.org"]
    for arguments in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "Begin"]):
        subprocess.run(["git", *arguments], cwd=project, check=True)
    return Workplace(home, project, f"{agent_server.url}/v1")


def codex(at: Workplace) -> str:
    at.write(
        ".codex/config.toml",
        'model = "tiny"\nmodel_provider = "cllm"\n\n[model_providers.cllm]\nname = "cllm"\n'
        f'base_url = "{at.base_url}"\nwire_api = "responses"\n\n[analytics]\nenabled = false\n',
    )
    return at.run(node_program(AGENTS_FOLDER, "codex"), "exec", "--dangerously-bypass-approvals-and-sandbox", QUESTION)


def opencode(at: Workplace) -> str:
    options = {"baseURL": at.base_url, "apiKey": "none"}
    model = {"name": "tiny", "limit": {"context": 65536, "output": 32000}}
    provider = {"npm": "@ai-sdk/openai-compatible", "name": "cllm", "options": options, "models": {"tiny": model}}
    config = {"model": "cllm/tiny", "small_model": "cllm/tiny", "autoupdate": False, "provider": {"cllm": provider}}
    (at.project / "opencode.json").write_text(json.dumps(config))
    return at.run(node_program(AGENTS_FOLDER, "opencode"), "run", QUESTION, OPENCODE_DISABLE_MODELS_FETCH="true")


def continue_cli(at: Workplace) -> str:
    model = {"name": "tiny", "provider": "openai", "model": "tiny", "apiBase": at.base_url, "apiKey": "none"}
    config = {"name": "local", "version": "0.0.1", "schema": "v1", "models": [{**model, "roles": ["chat"]}]}
    at.write("continue.yaml", json.dumps(config))  # JSON is YAML
    command = node_program(AGENTS_FOLDER, "cn")
    return at.run(
        command, "--config", at.home / "continue.yaml", "-p", "--auto", QUESTION, CONTINUE_TELEMETRY_ENABLED="0"
    )


def cline(at: Workplace) -> str:
    command = node_program(AGENTS_FOLDER, "cline")
    at.run(command, "auth", "-p", "openai", "-k", "none", "-m", "tiny", "-b", at.base_url)
    return at.run(command, "-P", "openai-compatible", "-m", "tiny", QUESTION)


def hermes(at: Workplace) -> str:
    model = {"default": "tiny", "provider": "custom", "base_url": at.base_url, "api_key": "none"}
    at.write(".hermes/config.yaml", json.dumps({"model": model}))
    return at.run(program("hermes", "hermes"), "chat", "-Q", "--yolo", "--ignore-rules", "-q", QUESTION)


@dataclass(frozen=True)
class CodingAgent:
    """How a coding agent is run, and what its own tools for reading and writing are called with."""

    run: Callable[[Workplace], str]
    turns: Callable[[Workplace], list[Calls]]


AGENTS = {
    "codex": CodingAgent(
        codex,
        lambda at: [
            [("exec_command", {"cmd": "cat note.txt"})],
            [("exec_command", {"cmd": "echo goodbye > reply.txt"})],
        ],
    ),
    "opencode": CodingAgent(
        opencode,
        lambda at: [
            [("read", {"filePath": at.note})],
            [("write", {"filePath": at.reply, "content": "goodbye\n"})],
        ],
    ),
    "continue": CodingAgent(
        continue_cli,
        lambda at: [
            [("Read", {"filepath": "note.txt"})],
            [("Write", {"filepath": at.reply, "content": "goodbye\n"})],
        ],
    ),
    "cline": CodingAgent(
        cline,
        lambda at: [
            [("read_files", {"files": [{"path": at.note}]})],
            [("run_commands", {"commands": ["echo goodbye > reply.txt"]})],
        ],
    ),
    "hermes": CodingAgent(
        hermes,
        lambda at: [
            [("read_file", {"path": at.note})],
            [("write_file", {"path": at.reply, "content": "goodbye\n"})],
        ],
    ),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=needs("hermes") if name == "hermes" else needs_node(AGENTS_FOLDER)) for name in AGENTS],
)
def test_a_coding_agent_reads_writes_and_reports(agent_server: RunningServer, workplace: Workplace, name: str) -> None:
    agent = AGENTS[name]
    agent_server.engine.say(by_turns(agent.turns(workplace), ANSWER))
    assert ANSWER in agent.run(workplace)
    assert (workplace.project / "reply.txt").read_text() == "goodbye\n"
    told = [agent_server.engine.decode(request.prompt_ids) for request in agent_server.engine.requests]
    assert any("hello" in prompt.rpartition("<tool_response>")[2] for prompt in told)


@needs("aider")
def test_aider_edits_and_commits(agent_server: RunningServer, workplace: Workplace) -> None:
    edit = "<<<<<<< SEARCH\n    return 1\n=======\n    return 2\n>>>>>>> REPLACE"
    agent_server.engine.say(
        lambda prompt: "Return two" if "commit message" in prompt else f"answer.py\n```python\n{edit}\n```\n"
    )
    workplace.run(
        program("aider", "aider"), "--model", "openai/tiny", "--openai-api-base", workplace.base_url,
        "--edit-format", "diff", "--yes-always", "--no-analytics", "--no-check-update", "--no-show-model-warnings",
        "--no-gitignore", "--map-tokens", "0", "--message", "Return two", "answer.py",
    )  # fmt: skip
    assert (workplace.project / "answer.py").read_text() == "def answer():\n    return 2\n"
    log = subprocess.run(["git", "log", "--format=%s", "-1"], cwd=workplace.project, check=True, capture_output=True)
    assert log.stdout.decode().strip() == "Return two"
