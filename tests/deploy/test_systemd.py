"""The unit is one that systemd takes, and its settings and times are those of the server."""

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from server.engine_settings import ENV_PREFIX
from server.settings import ServerSettings

SYSTEMD = Path(__file__).parents[2] / "deploy" / "systemd"


def read_unit() -> configparser.ConfigParser:
    unit = configparser.ConfigParser(interpolation=None, strict=True)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(SYSTEMD / "cllm.service")
    return unit


def test_the_server_may_drain_before_it_is_killed() -> None:
    service = read_unit()["Service"]
    drain = ServerSettings.model_fields["drain_seconds"].default
    assert int(service["TimeoutStopSec"]) >= ServerSettings.model_fields["shutdown_delay"].default + drain + 15
    assert service["KillMode"] == "mixed"


def test_the_environment_file_is_made_of_settings() -> None:
    named = re.findall(rf"^(?:# )?({ENV_PREFIX}\w+)=", (SYSTEMD / "cllm.env").read_text(), re.MULTILINE)
    assert named
    assert {name.removeprefix(ENV_PREFIX).lower() for name in named} <= ServerSettings.model_fields.keys()


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed")
    # It looks for the program, which is not installed here.
    text = (
        (SYSTEMD / "cllm.service").read_text(encoding="utf-8").replace("/opt/cllm/bin/cllm", shutil.which("true") or "")
    )
    (tmp_path / "cllm.service").write_text(text, encoding="utf-8")
    command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / "cllm.service")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    complaints = [line for line in done.stderr.splitlines() if "cllm.service" in line]
    assert (done.returncode, complaints) == (0, [])
