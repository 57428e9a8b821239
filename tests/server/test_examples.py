"""The examples run as they stand, against a server in a thread."""

import subprocess
import sys
from pathlib import Path

from tests.server.harness import RunningServer

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_edit_this_file_asks_with_and_without_a_prediction(server: RunningServer, tmp_path: Path) -> None:
    file = tmp_path / "total.py"
    file.write_text("def total(prices):\n    return sum(prices)\n")
    command = [
        sys.executable,
        str(EXAMPLES / "edit_this_file.py"),
        str(file),
        "--base-url",
        f"{server.url}/v1",
        "--max-tokens",
        "8",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    without, with_prediction, verdict = done.stdout.splitlines()
    assert without.startswith("without one: ")
    assert with_prediction.startswith("with a prediction: ")
    assert verdict == "the same answer"
