"""Records out of JSON files, checked against a type, with errors that name the file and the line."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from cllm_core.errors import ConfigError, DataError

Record = TypeVar("Record")


def read_json_list(path: Path, record_type: type[Record]) -> list[Record]:
    """The records of a file that holds one JSON array.

    Raises:
        DataError: the file cannot be read, is no array, holds no record, or one does not fit `record_type`.
    """
    try:
        records = msgspec.json.decode(_read_bytes(path), type=list[record_type])  # type: ignore[valid-type]
    except (msgspec.DecodeError, ConfigError) as error:
        raise DataError(f"{path}: {error}; expected a JSON array of {_describe(record_type)}") from error
    if not records:
        raise DataError(f"{path}: holds no record; expected a JSON array of {_describe(record_type)}")
    return list(records)


def read_json_lines(path: Path, record_type: type[Record]) -> list[Record]:
    """The records of a file with one JSON object a line; a name that ends in .gz is decompressed.

    Raises:
        DataError: the file cannot be read, holds no record, or a line does not fit `record_type` (its number is named).
    """
    return [record for _, record in read_numbered_lines(path, record_type)]


def read_numbered_lines(path: Path, record_type: type[Record]) -> list[tuple[int, Record]]:
    """As `read_json_lines`, each record with the number of its line, from 1."""
    records = list(decode_lines(_read_bytes(path), record_type, path))
    if not records:
        raise DataError(f"{path}: holds no record; expected one {_describe(record_type)} a line")
    return records


def decode_lines(data: bytes, record_type: type[Record], path: Path) -> Iterator[tuple[int, Record]]:
    """Decode JSON lines, empty ones passed over, each with its number from 1.

    Args:
        data: the lines.
        record_type: of each record.
        path: of the file they come from, for messages.

    Raises:
        DataError: a line is broken.
    """
    decoder = msgspec.json.Decoder(record_type)
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield number, decoder.decode(line)
        except (msgspec.DecodeError, ConfigError) as error:
            raise DataError(
                f"{path}, line {number}: {error}; each line is {_describe(record_type)}, correct or remove this one"
            ) from error


def _read_bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); name a readable file") from error


def _describe(record_type: type[object]) -> str:
    """A record type as the user sees it: its required and optional fields."""
    if not isinstance(record_type, type) or not issubclass(record_type, msgspec.Struct):
        return "an object"
    fields = msgspec.structs.fields(record_type)
    return "{" + ", ".join(f'"{f.encode_name}"' + ("" if f.required else "?") for f in fields) + "}"
