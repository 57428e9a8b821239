"""What rank 0 tells the others, one frame each: calls of PagedModel."""

import struct
from collections.abc import Sequence
from typing import BinaryIO

import msgspec
import numpy as np
import torch
from torch import Tensor

from cllm_core.models.paged import RowSpan

_LENGTH = struct.Struct("<Q")


class AllocateCache(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """PagedModel.allocate_cache."""

    num_blocks: int
    block_size: int


class FreeCache(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """PagedModel.free_cache."""


class ClearBlocks(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """PagedModel.clear_blocks."""

    block_ids: tuple[int, ...]


class Forward(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """PagedModel.forward; the tensors as the bytes of int64 arrays."""

    input_ids: bytes
    positions: bytes
    rows: tuple[RowSpan, ...]
    sampled: bytes

    @classmethod
    def of(cls, input_ids: Tensor, positions: Tensor, rows: Sequence[RowSpan], sampled: Tensor) -> "Forward":
        """See PagedModel.forward."""
        return cls(_to_bytes(input_ids), _to_bytes(positions), tuple(rows), _to_bytes(sampled))

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """input_ids [T], positions [T] and sampled [S], int64."""
        return _to_tensor(self.input_ids, device), _to_tensor(self.positions, device), _to_tensor(self.sampled, device)


Message = AllocateCache | FreeCache | ClearBlocks | Forward

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


def write_message(pipe: BinaryIO, message: Message) -> None:
    """Send a message as a whole."""
    frame = _encoder.encode(message)
    pipe.write(_LENGTH.pack(len(frame)) + frame)
    pipe.flush()


def read_message(pipe: BinaryIO) -> Message | None:
    """The next message, None where the other side has closed the pipe."""
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (size,) = _LENGTH.unpack(head)
    frame = pipe.read(size)
    return _decoder.decode(frame) if len(frame) == size else None


def _to_bytes(tensor: Tensor) -> bytes:
    return tensor.to("cpu", torch.int64).numpy().tobytes()


def _to_tensor(values: bytes, device: torch.device) -> Tensor:
    return torch.from_numpy(np.frombuffer(values, dtype=np.int64).copy()).to(device)
