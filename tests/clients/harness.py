"""Where the clients are installed, and how they are run."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ENVIRONMENTS = Path(os.environ.get("CLLM_CLIENTS", ".venv-clients")).absolute()
NODE = HERE / "node"
_MODULES = "node_modules"


def needs_node(folder: Path = NODE) -> pytest.MarkDecorator:
    """Skips where the packages of <folder>/package.json are not installed."""
    return pytest.mark.skipif(
        shutil.which("node") is None or not (folder / _MODULES).exists(),
        reason="Node.js or the clients for it are missing: install node and npm, then make test-clients",
    )


def node_program(folder: Path, name: str) -> Path:
    """A program of the packages of <folder>/package.json."""
    return folder / _MODULES / ".bin" / name


def needs(environment: str) -> pytest.MarkDecorator:
    """Skips where the packages of requirements/<environment>.txt are not installed."""
    folder = ENVIRONMENTS / environment
    return pytest.mark.skipif(not folder.exists(), reason=f"{folder} is missing: make test-clients makes it")


def program(environment: str, name: str = "python") -> Path:
    """A program of the packages of requirements/<environment>.txt."""
    return ENVIRONMENTS / environment / "bin" / name


def run(*command: str | Path, folder: Path | None = None, **environment: str) -> str:
    """Standard output of a client program, which must succeed."""
    done = subprocess.run(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_script(name: str, *arguments: str | Path, environment: str = "libraries") -> Any:
    """What a script of ours, run among the client packages, found."""
    found = run(program(environment), HERE / "scripts" / name, *arguments)
    return json.loads(found.splitlines()[-1])


def run_node_script(name: str, *arguments: str) -> Any:
    """What a script of ours for Node.js found."""
    return json.loads(run("node", NODE / name, *arguments))
