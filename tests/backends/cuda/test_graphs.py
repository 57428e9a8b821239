"""Which streams GraphCapture leaves behind, over a torch.cuda that has streams but no device."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch

from cllm_core.backends.cuda.graphs import GraphCapture
from cllm_core.backends.cuda.static_steps import NotCapturable


@dataclass(eq=False)
class FakeStream:
    waited_for: list["FakeStream"] = field(default_factory=list)

    def wait_stream(self, other: "FakeStream") -> None:
        self.waited_for.append(other)


class FakeGraph:
    def replay(self) -> None:
        pass


class FakeCuda:
    """Keeps the current stream as torch does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps = self.current = FakeStream()
        self.made: list[FakeStream] = []
        self.is_capture_broken = False
        fakes = {
            "Stream": self.make_stream,
            "CUDAGraph": FakeGraph,
            "current_stream": lambda device: self.current,
            "set_stream": self.set_stream,
            "stream": self.on,
            "graph": self.capture,
            "graph_pool_handle": lambda: (0, 1),
            "synchronize": lambda device: None,
            "get_sync_debug_mode": lambda: 0,
            "set_sync_debug_mode": lambda mode: None,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def make_stream(self, device: torch.device) -> FakeStream:
        self.made.append(FakeStream())
        return self.made[-1]

    def set_stream(self, stream: FakeStream) -> None:
        self.current = stream

    @contextmanager
    def on(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def capture(self, graph: FakeGraph, **_: object) -> Iterator[None]:
        before, self.current = self.current, FakeStream()
        yield
        if self.is_capture_broken:
            raise RuntimeError("capture_end")
        self.current = before


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def test_all_work_warms_up_on_one_stream(cuda: FakeCuda) -> None:
    """A new stream for every shape left a workspace of cuBLAS behind for each."""
    capture = GraphCapture(torch.device("cuda"))
    used = []
    for _ in range(3):
        capture(lambda: used.append(cuda.current))
    assert len(cuda.made) == 1
    assert used.count(cuda.made[0]) == 4  # once per work, and once to check whether it can be captured
    assert cuda.steps not in used


def test_a_step_waits_for_work_that_failed_in_its_warm_up(cuda: FakeCuda) -> None:
    """It did not, and the buffers that this work still wrote to were given to others."""

    def fail() -> None:
        raise RuntimeError("no")

    capture = GraphCapture(torch.device("cuda"))
    with pytest.raises(RuntimeError, match="no"):
        capture(fail)
    runs = iter((lambda: None, fail))

    def fail_when_checked() -> None:
        next(runs)()

    with pytest.raises(NotCapturable, match="waits for the device"):
        capture(fail_when_checked)
    assert cuda.steps.waited_for == cuda.made * 2
    assert cuda.current is cuda.steps


def test_a_capture_that_cannot_be_ended_leaves_the_stream_of_steps_current(cuda: FakeCuda) -> None:
    capture = GraphCapture(torch.device("cuda"))
    cuda.is_capture_broken = True
    with pytest.raises(NotCapturable, match="capture_end"):
        capture(lambda: None)
    assert cuda.current is cuda.steps
