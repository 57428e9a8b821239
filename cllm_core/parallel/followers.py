"""The ranks above 0 as rank 0 sees them: started, told every call of the model, ended."""

import atexit
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import BinaryIO, cast

import msgspec
from torch import Tensor

from cllm_core.config import EngineConfig
from cllm_core.models.paged import RowSpan
from cllm_core.parallel.group import join_group, leave_group
from cllm_core.parallel.messages import AllocateCache, ClearBlocks, Forward, FreeCache, Message, write_message

logger = logging.getLogger(__name__)

_EXIT_SECONDS = 5.0


class Followers:
    """ModelCalls for the processes of the other ranks. They end with this process, however it ends.

    A rank that dies takes this process with it: without it no forward pass can be computed.

    Args:
        config: with tensor_parallel_size above 1; this process becomes rank 0 of the group.

    Raises:
        ConfigError: as join_group.
    """

    def __init__(self, config: EngineConfig) -> None:
        port = _free_port()
        self._is_closing = False
        self._processes = [_start(config, rank, port) for rank in range(1, config.tensor_parallel_size)]
        atexit.register(self.close)
        for rank, process in enumerate(self._processes, start=1):
            threading.Thread(target=self._watch, args=(rank, process), daemon=True, name=f"rank {rank}").start()
        try:
            join_group(config, rank=0, port=port)
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the processes, in the order of ranks."""
        return tuple(process.pid for process in self._processes)

    def allocate_cache(self, num_blocks: int, block_size: int) -> None:
        """See ModelCalls."""
        self._send(AllocateCache(num_blocks, block_size))

    def free_cache(self) -> None:
        """See ModelCalls."""
        self._send(FreeCache())

    def clear_blocks(self, block_ids: Sequence[int]) -> None:
        """See ModelCalls."""
        self._send(ClearBlocks(tuple(block_ids)))

    def forward(self, input_ids: Tensor, positions: Tensor, rows: Sequence[RowSpan], sampled: Tensor) -> None:
        """See ModelCalls."""
        self._send(Forward.of(input_ids, positions, rows, sampled))

    def close(self) -> None:
        """End the processes and leave the group; no-op the second time."""
        if self._is_closing:
            return
        self._is_closing = True
        atexit.unregister(self.close)
        for process in self._processes:
            _pipe(process).close()
        for process in self._processes:
            try:
                process.wait(_EXIT_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        leave_group()

    def _send(self, message: Message) -> None:
        for process in self._processes:
            write_message(_pipe(process), message)

    def _watch(self, rank: int, process: "subprocess.Popen[bytes]") -> None:
        code = process.wait()
        if not self._is_closing:
            logger.critical("the process of rank %d ended with exit code %d: the model cannot be computed", rank, code)
            os.kill(os.getpid(), signal.SIGKILL)


def _start(config: EngineConfig, rank: int, port: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "cllm_core.parallel.follower", "--rank", str(rank), "--port", str(port)]
    arguments = ["--config", msgspec.json.encode(config).decode()]
    # Out of reach of the terminal's Ctrl-C: it ends by the end of the pipe.
    return subprocess.Popen(
        [*command, *arguments], stdin=subprocess.PIPE, stdout=sys.__stderr__, start_new_session=True
    )


def _pipe(process: "subprocess.Popen[bytes]") -> BinaryIO:
    return cast(BinaryIO, process.stdin)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
