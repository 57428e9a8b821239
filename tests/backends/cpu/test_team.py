"""The kernels' own threads (team.h)."""

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cllm_core.backends.cpu.compilation import FLAGS, SOURCE_FOLDER, find_compiler
from cllm_core.backends.cpu.kernels import Kernels
from cllm_core.backends.cpu.library import KernelLibrary
from cllm_core.backends.cpu.weights import PANEL, PanelWeight

NUM_CALLS = 200


@pytest.fixture
def best(library: KernelLibrary) -> Kernels:
    return library.kernels()


@pytest.fixture(autouse=True)
def _more_threads_than_processors() -> Iterator[None]:
    torch.set_num_threads((os.cpu_count() or 1) + 3)
    yield
    torch.set_num_threads(1)


def make_product() -> tuple[Tensor, PanelWeight]:
    return torch.randn(7, 64).bfloat16(), PanelWeight.of(torch.randn(40 * PANEL, 64).bfloat16())


def test_calls_that_come_at_once_get_what_each_gets_alone(best: Kernels) -> None:
    x, weight = make_product()
    expected = best.linear(x, weight)
    with ThreadPoolExecutor(4) as callers:
        outputs = list(callers.map(lambda _: best.linear(x, weight), range(NUM_CALLS)))
    assert all(torch.equal(output, expected) for output in outputs)


def test_the_number_of_threads_may_change_from_call_to_call(best: Kernels) -> None:
    x, weight = make_product()
    expected = best.linear(x, weight)
    for call in range(NUM_CALLS):
        torch.set_num_threads(1 + call % 5)
        assert torch.equal(best.linear(x, weight), expected)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of a process with threads: that is the point
def test_a_forked_process_has_threads_of_its_own(best: Kernels) -> None:
    """A child has none of its parent's threads, and would wait for them for ever."""
    x, weight = make_product()
    expected = best.linear(x, weight)
    child = os.fork()
    if not child:
        signal.alarm(60)
        os._exit(0 if torch.equal(best.linear(x, weight), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("flags", [(), pytest.param(("-g", "-fsanitize=thread"), marks=pytest.mark.slow)])
@pytest.mark.parametrize("num_threads", [2, 7])
def test_each_item_is_run_once_and_after_the_loop_before(
    num_threads: int, flags: tuple[str, ...], tmp_path: Path
) -> None:
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("there is no C compiler here")
    sources = [str(Path(__file__).with_name("stress_team.c")), str(SOURCE_FOLDER / "team.c")]
    program = str(tmp_path / "stress_team")
    subprocess.run([*compiler, *FLAGS, *flags, f"-I{SOURCE_FOLDER}", *sources, "-o", program], check=True)
    ended = subprocess.run([program, str(num_threads), "200000"], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_forked_in_the_middle_of_a_loop_does_not_go_on_with_it(best: Kernels) -> None:
    x, weight = make_product()
    expected = best.linear(x, weight)
    stop = threading.Event()

    def keep_calling() -> None:
        while not stop.is_set():
            best.linear(x, weight)

    other = threading.Thread(target=keep_calling)
    other.start()
    try:
        for _ in range(10):
            child = os.fork()
            if not child:
                signal.alarm(60)
                os._exit(0 if all(torch.equal(best.linear(x, weight), expected) for _ in range(20)) else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        other.join()


def test_torch_has_one_thread_where_small_operations_run_between_kernels(best: Kernels) -> None:
    before = torch.get_num_threads()
    assert before > 1
    with best.serial_torch():
        assert (torch.get_num_threads(), best.num_threads) == (1, before)
    assert (torch.get_num_threads(), best.num_threads) == (before, before)
