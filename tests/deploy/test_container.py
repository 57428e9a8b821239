"""The image, built for real, serves as a user without privileges on a read-only root, and drains on SIGTERM."""

import json
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.container import build_image, image_files, missing_tools, running_image
from tests.server.serve_process import ServeProcess

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(bool(missing_tools()), reason=f"needs {', '.join(missing_tools())}"),
]


@pytest.fixture(scope="module")
def files() -> Iterator[Path]:
    build_image()
    with image_files() as found:
        yield found


def test_the_image_has_neither_compilers_nor_cuda_libraries(files: Path) -> None:
    programs = {
        path.name for folder in ("usr/bin", "usr/local/bin", "opt/venv/bin") for path in files.glob(f"{folder}/*")
    }
    assert "cllm" in programs
    assert programs & {"gcc", "cc", "g++", "clang", "as", "ld", "make", "uv"} == set()
    (packages,) = files.glob("opt/venv/lib/python3*/site-packages")
    assert [path.name for path in packages.glob("nvidia*")] == []
    assert [path.name for path in packages.glob("torch/lib/*cuda*")] == []
    assert len(list(packages.glob("cllm_core/backends/cpu/kernels-*.so"))) == 1


def test_a_container_without_privileges_streams_and_drains(files: Path, tmp_path: Path) -> None:
    assert files.exists()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    environment = {"CLLM_HOST": "127.0.0.1", "CLLM_PORT": str(port), "CLLM_LOG_FORMAT": "json"}
    with running_image(tmp_path / "log", tmp_path / "cache", environment) as process:
        served = ServeProcess(tmp_path / "log")
        served.wait_ready()
        status = Path(f"/proc/{process.pid}/status").read_text()
        held = dict(line.split(":\t", 1) for line in status.splitlines())
        assert held["Uid"].split() == ["10001"] * 4
        assert {int(held[name], 16) for name in ("CapPrm", "CapEff", "CapInh", "CapBnd", "CapAmb")} == {0}
        assert held["NoNewPrivs"] == "1"
        mounts = [line.split() for line in Path(f"/proc/{process.pid}/mountinfo").read_text().splitlines()]
        assert "ro" in next(mount[5] for mount in mounts if mount[4] == "/").split(",")

        body = {"messages": [{"role": "user", "content": "Count to twenty."}], "stream": True, "max_tokens": 64}
        with served.http.stream("POST", "/v1/chat/completions", json=body) as response:
            events = (line.removeprefix("data: ") for line in response.iter_lines() if line)
            chunks = [next(events)]
            process.send_signal(signal.SIGTERM)
            chunks += events
        assert chunks[-1] == "[DONE]"
        assert len(chunks) > 3
        assert json.loads(chunks[-2])["choices"][0]["finish_reason"] in {"stop", "length"}
        # After the drain uvicorn passes the signal on, so that the parent sees why the server ended.
        assert process.wait(timeout=60) == -signal.SIGTERM
