"""Records out of JSON lines."""

import gzip
from pathlib import Path

import pytest

from cllm_core.errors import DataError
from cllm_core.tasks.records import read_json_lines, read_numbered_lines
from cllm_core.tasks.spider import SpiderExample

GOOD = '{"db_id": "a", "question": "b", "query": "c"}'


def test_compressed_lines_read_as_plain_ones(tmp_path: Path) -> None:
    plain, packed = tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"
    plain.write_text(f"{GOOD}\n\n{GOOD}\n")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_json_lines(packed, SpiderExample) == read_json_lines(plain, SpiderExample)


def test_line_numbers_count_empty_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{GOOD}\n\n{GOOD}\n")
    assert [number for number, _ in read_numbered_lines(path, SpiderExample)] == [1, 3]


@pytest.mark.parametrize("line", ["{", '{"db_id": "a"}', "[1]", '"text"'])
def test_broken_line_is_named_by_file_and_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: .*each line is"):
        read_json_lines(path, SpiderExample)


def test_empty_and_damaged_files_are_refused(tmp_path: Path) -> None:
    empty, damaged = tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"
    empty.write_text("\n")
    with pytest.raises(DataError, match="holds no record"):
        read_json_lines(empty, SpiderExample)
    whole = gzip.compress(GOOD.encode())
    for data in (b"not gzip", whole[:20], whole[:10] + b"\xff" * 20):
        damaged.write_bytes(data)
        with pytest.raises(DataError, match="cannot be read"):
            read_json_lines(damaged, SpiderExample)
