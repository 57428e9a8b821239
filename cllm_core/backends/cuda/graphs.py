"""GraphCapture: work on a CUDA device as graphs, each launched by one call instead of hundreds."""

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cllm_core.backends.cuda.static_steps import NotCapturable, Work

logger = logging.getLogger(__name__)

# What the driver keeps for a graph of a thousand kernels, beyond the memory they compute in; an upper bound.
BYTES_PER_GRAPH = 8 * 1024**2

# torch keeps a workspace of cuBLAS for every stream that it ever ran on: 32 MiB on Hopper, less on older devices.
# Capturing needs two streams beyond the one of the steps: one to warm up on, and torch's own for the capture.
WORKSPACE_BYTES = 2 * 32 * 1024**2


class GraphCapture:
    """Captures CUDA graphs (Capture), which share one pool of memory: only one of them runs at a time.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._side = torch.cuda.Stream(device)
        self._is_checked = False

    def __call__(self, work: Work) -> Work:
        """See Capture. Where the host would have to wait for the device in between, there is no graph."""
        started = time.perf_counter()
        current = torch.cuda.current_stream(self._device)
        self._warm_up(work, current)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads of the process, of a training loop say, may use the device meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                work()
        except RuntimeError as error:
            # Where ending the capture fails, torch leaves the stream of the capture the current one.
            torch.cuda.set_stream(current)
            torch.cuda.synchronize(self._device)
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise NotCapturable(f"the CUDA graph cannot be captured: {error}") from error
        logger.debug("captured a CUDA graph in %.0f ms", 1e3 * (time.perf_counter() - started))
        return graph.replay

    def _warm_up(self, work: Work, current: torch.cuda.Stream) -> None:
        """Run once before capture, as that needs: compiles kernels, and makes what libraries make on first use."""
        self._side.wait_stream(current)
        try:
            with torch.cuda.stream(self._side):
                work()
                if not self._is_checked:
                    # A capture that fails leaves the allocator in a poor state, so what would fail is found before.
                    self._check(work)
        finally:
            # After an error too: what the work writes to may be freed next, and used again while it still runs.
            current.wait_stream(self._side)
        self._is_checked = True

    def _check(self, work: Work) -> None:
        try:
            with _synchronizing_refused():
                work()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise NotCapturable(f"the model waits for the device in its forward pass: {error}") from error


@contextmanager
def _synchronizing_refused() -> Iterator[None]:
    """Let operations of torch that wait for the device raise RuntimeError."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls this mode a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)
