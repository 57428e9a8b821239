"""HumanEval (Chen et al. 2021, arXiv:2107.03374): a generated function passes if its tests do.

This runs code that a model wrote. It runs in a process of its own, in an empty folder that is deleted afterwards,
without the environment of this process and within limits on time, memory and file size. That contains mistakes, not
malice: there is no barrier to the network or to files that the user may read. Use a container where that matters.
"""

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec

_FENCE = re.compile(r"```[ \t]*\w*[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)
_RUNNER = Path(__file__).with_name("guarded_run.py")
_TIMEOUT_SECONDS = 10.0
_MAX_ANSWER_BYTES = 4096


class Problem(msgspec.Struct, frozen=True):
    """A function to be written: its head and docstring, and the tests that it must pass."""

    task_id: str
    prompt: str
    entry_point: str
    test: str


def format_prompt(problem: Problem) -> str:
    """The user's message."""
    return (
        f"Complete this Python function. Answer with the whole function.\n\n```python\n{problem.prompt.rstrip()}\n```"
    )


def read_code(answer: str, problem: Problem) -> str:
    """The program in an answer: its first code block, else all of it, behind the prompt unless it defines the function.

    The prompt goes first in any case, for its imports and helpers.
    """
    block = _FENCE.search(answer)
    code = block.group(1) if block else answer
    if re.search(rf"^\s*def\s+{re.escape(problem.entry_point)}\s*\(", code, re.MULTILINE):
        return f"{_head(problem)}\n{code}"
    return f"{problem.prompt}{code}"


def passes(code: str, problem: Problem, *, timeout: float = _TIMEOUT_SECONDS) -> bool:
    """Run the program and its tests in a process of its own.

    Args:
        code: from `read_code`.
        problem: whose tests to run.
        timeout: seconds of wall-clock time.
    """
    program = f"{code}\n\n{problem.test}\n\ncheck({problem.entry_point})\n"
    # the program cannot know the token, so it cannot pass by leaving early
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="cllm-eval-") as folder:
        path = Path(folder) / "program.py"
        path.write_text(program, encoding="utf-8", errors="replace")
        return token in _run(path, token, timeout)


def _head(problem: Problem) -> str:
    """What the prompt has above the function: imports and helpers."""
    return re.split(rf"^def\s+{re.escape(problem.entry_point)}\s*\(", problem.prompt, maxsplit=1, flags=re.MULTILINE)[0]


def _run(path: Path, token: str, timeout: float) -> str:
    """Standard output of the program's process; empty where the time was up."""
    with subprocess.Popen(  # whose end closes the pipes: a child in a session of its own may hold them for ever
        [sys.executable, "-I", "-S", str(_RUNNER), str(path), str(int(timeout) + 1)],
        cwd=path.parent,
        env={"PATH": os.defpath, "HOME": str(path.parent)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(f"{token}\n".encode(), timeout=timeout)
            return output[-_MAX_ANSWER_BYTES:].decode("utf-8", "replace")
        except subprocess.TimeoutExpired:
            return ""
        finally:
            with contextlib.suppress(ProcessLookupError):  # it and its children may have ended
                os.killpg(process.pid, signal.SIGKILL)
