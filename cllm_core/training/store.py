"""Trajectories on the disk: a folder of compressed shards, written by one run or several that continue each other.

The processes of one launch write to one folder: process r of w takes the shards whose number modulo w is r.

meta.json               how they were recorded
part-00000.jsonl.zst    one record a line; a shard appears whole or not at all
"""

import hashlib
import io
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import msgspec
from msgspec import UNSET, UnsetType

from cllm_core.errors import ConfigError, DataError
from cllm_core.info import TokenizerBundle
from cllm_core.tasks.records import decode_lines
from cllm_core.training.examples import Trajectory
from cllm_core.training.launch import rank, world_size

META_FILE = "meta.json"
_SHARDS = "part-*.jsonl.zst"
_COMPRESSION_LEVEL = 6


class StoreMeta(msgspec.Struct, frozen=True, kw_only=True):
    """How the trajectories of a folder were recorded; a run that goes on must do the same.

    What is unset was not noted, as in folders of earlier versions; a run that goes on may do as it likes there.

    Attributes:
        model: name of the teacher.
        tokenizer: fingerprint of its tokenizer, which the model to train must share.
        block_length, max_tokens: of the decoding, in tokens.
        prompts: where the prompts came from.
        adapter: merged into the teacher.
        split, prompt_column, tables, renamings: how the data was read.
        prompt_temperature: of self-written prompts, None where there are none.
        keep_unfinished, max_repetition: of the cleaning.
    """

    model: str
    tokenizer: str
    block_length: int
    max_tokens: int
    prompts: str
    adapter: str | UnsetType | None = UNSET
    split: str | UnsetType = UNSET
    prompt_column: str | UnsetType = UNSET
    tables: str | UnsetType | None = UNSET
    renamings: int | UnsetType = UNSET
    prompt_temperature: float | UnsetType | None = UNSET
    keep_unfinished: bool | UnsetType = UNSET
    max_repetition: float | UnsetType = UNSET


class Record(msgspec.Struct, frozen=True):
    """A line of a shard.

    Attributes:
        index: of the prompt.
        trajectory: without states where it was dropped.
        dropped: why cleaning left it out, None where it is good.
        prompt: fingerprint of the prompt as it was given; None in folders of earlier versions.
    """

    index: int
    trajectory: Trajectory
    dropped: str | None = None
    prompt: str | None = None


class TrajectoryWriter:
    """Appends records to a folder; use it as a context manager, which writes the last shard.

    Args:
        folder: made where it does not exist.
        meta: of this run.
        shard_size: records in a shard.

    Raises:
        DataError: the folder holds trajectories that were recorded in another way, or a shard is damaged.
        ConfigError: a package is missing, or the folder cannot be written.
    """

    def __init__(self, folder: Path, meta: StoreMeta, *, shard_size: int) -> None:
        _zstandard()
        self._folder = folder
        self._shard_size = shard_size
        self._pending: list[Record] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._check_meta(meta)
            _replace(folder / META_FILE, msgspec.json.format(msgspec.json.encode(meta)) + b"\n")
        except OSError as error:
            raise ConfigError(f"output={folder}: cannot be written ({error}); name another folder") from error
        num_shards = max((_shard_number(path) + 1 for path in folder.glob(_SHARDS)), default=0)
        self._next_shard = math.ceil(num_shards / world_size()) * world_size() + rank()

    def __enter__(self) -> "TrajectoryWriter":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._flush()

    def write(self, record: Record) -> None:
        """Keep a record; a full shard goes to the disk."""
        self._pending.append(record)
        if len(self._pending) >= self._shard_size:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        lines = b"".join(msgspec.json.encode(record) + b"\n" for record in self._pending)
        compressed = _zstandard().ZstdCompressor(level=_COMPRESSION_LEVEL).compress(lines)
        _replace(self._folder / f"part-{self._next_shard:05d}.jsonl.zst", compressed)
        self._next_shard += world_size()
        self._pending = []

    def _check_meta(self, meta: StoreMeta) -> None:
        before = read_meta(self._folder)
        if before is None:
            return
        old, new = msgspec.to_builtins(before), msgspec.to_builtins(meta)
        changed = [f"{name} was {old[name]!r}, is {new[name]!r}" for name in old if old[name] != new[name]]
        if changed:
            raise DataError(
                f"{self._folder} holds trajectories recorded in another way ({'; '.join(changed)}): "
                "name another output folder"
            )


def read_meta(folder: Path) -> StoreMeta | None:
    """How the folder's trajectories were recorded; None where it holds none."""
    path = folder / META_FILE
    if not path.exists():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=StoreMeta)
    except msgspec.DecodeError as error:
        raise DataError(f"{path}: {error}; remove the folder and record anew") from error


def read_records(folder: Path) -> Iterator[Record]:
    """All records of a folder, shard by shard.

    Raises:
        DataError: a shard is damaged (it is named).
    """
    zstandard = _zstandard()
    for path in sorted(folder.glob(_SHARDS)):
        try:
            with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(path.read_bytes())) as stream:
                data = stream.read()
        except zstandard.ZstdError as error:
            raise DataError(f"{path}: damaged ({error}); remove it and run `cllm trajectories` again") from error
        yield from (record for _, record in decode_lines(data, Record, path))


def read_trajectories(folder: Path, tokenizer: TokenizerBundle) -> list[Trajectory]:
    """The good trajectories of a folder, at least one.

    Args:
        folder: written by `cllm trajectories`.
        tokenizer: of the model that shall learn from them.

    Raises:
        DataError: there are none, a shard is damaged, or they were recorded with another tokenizer.
    """
    meta = read_meta(folder)
    if meta is None:
        raise DataError(f"{folder}: has no {META_FILE}; name a folder written by `cllm trajectories`")
    if meta.tokenizer != tokenizer_fingerprint(tokenizer):
        raise DataError(f"{folder}: recorded with {meta.model}, whose tokenizer is not that of the model to train")
    found = [record.trajectory for record in read_records(folder) if record.dropped is None]
    if not found:
        raise DataError(f"{folder}: holds no usable trajectory; run `cllm trajectories` with other prompts or limits")
    return found


def tokenizer_fingerprint(bundle: TokenizerBundle) -> str:
    """Changes with anything that changes token ids."""
    return hashlib.sha256(bundle.tokenizer_json.encode()).hexdigest()[:16]


def _replace(path: Path, data: bytes) -> None:
    """Write a file that others see whole or not at all."""
    scratch = path.with_suffix(f".partial-{rank()}")
    scratch.write_bytes(data)
    scratch.rename(path)


def _shard_number(path: Path) -> int:
    return int(path.name.removeprefix("part-").partition(".")[0])


def _zstandard() -> ModuleType:
    try:
        import zstandard  # noqa: PLC0415 - needed for training alone
    except ImportError as error:
        raise ConfigError(
            "trajectories are compressed with zstandard: run `pip install 'cllm-server[train]'`"
        ) from error
    return zstandard
