"""The kernels' own threads (team.h)."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

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
