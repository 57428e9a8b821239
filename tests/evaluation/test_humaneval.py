"""Running generated code: right, wrong, endless and hostile programs."""

import time

import pytest

from cllm_core.evaluation.humaneval import Problem, passes, read_code

PROBLEM = Problem(
    task_id="T/0",
    prompt='from typing import List\n\n\ndef total(values: List[int]) -> int:\n    """Their sum."""\n',
    entry_point="total",
    test="def check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n",
)
RIGHT = "def total(values: List[int]) -> int:\n    return sum(values)\n"


@pytest.mark.parametrize(
    "answer",
    [
        RIGHT,
        f"Here it is:\n```python\n{RIGHT}```\nIt adds them.",
        f"```\n{RIGHT}",
        "    return sum(values)\n",
        "```python\n    return sum(values)\n```",
    ],
)
def test_a_right_function_passes_in_every_form_of_answer(answer: str) -> None:
    assert passes(read_code(answer, PROBLEM), PROBLEM)


@pytest.mark.parametrize(
    "body",
    [
        "return 0",
        "return sum(values",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise KeyboardInterrupt",
        "x = bytearray(8 << 30); return sum(values)",
        "open('big', 'w').write('x' * (2 << 20)); return sum(values)",
    ],
)
def test_wrong_code_does_not_pass(body: str) -> None:
    assert not passes(f"def total(values):\n    {body}\n", PROBLEM)


def test_endless_code_is_stopped_with_all_it_started() -> None:
    started = time.monotonic()
    code = (
        "import subprocess, sys\ndef total(values):\n    subprocess.run([sys.executable, '-c', 'while True: pass'])\n"
    )
    assert not passes(code, PROBLEM, timeout=0.5)
    assert time.monotonic() - started < 10


def test_a_child_in_a_session_of_its_own_holds_nothing_up() -> None:
    """It is in no group that could be stopped and keeps the pipe open, whose end was waited for without a limit."""
    started = time.monotonic()
    code = f"import os, time\nif not os.fork():\n    os.setsid()\n    time.sleep(15)\n    os._exit(0)\n{RIGHT}"
    passes(read_code(code, PROBLEM), PROBLEM, timeout=0.5)
    assert time.monotonic() - started < 10


def test_what_an_answer_does_as_a_script_is_not_run() -> None:
    """unittest.main() leaves the process before the tests of the problem, which exec as in the paper never reaches."""
    script = 'if __name__ == "__main__":\n    import unittest\n\n    unittest.main()\n'
    assert passes(read_code(RIGHT + script, PROBLEM), PROBLEM)


def test_code_does_not_see_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "x")
    code = "import os\ndef total(values):\n    assert 'SECRET_KEY' not in os.environ\n    return sum(values)\n"
    assert passes(code, PROBLEM)
