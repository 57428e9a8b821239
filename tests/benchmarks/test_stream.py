"""Streams of several servers are read alike."""

import msgspec
import pytest

from benchmarks.served.stream import read_line


@pytest.mark.parametrize("line", [b"", b"\n", b": ping\n", b"event: x\n", b"data: [DONE]\n", b"data:[DONE]\r\n"])
def test_lines_that_carry_no_chunk_are_passed_over(line: bytes) -> None:
    assert read_line(line) is None


def test_text_and_finish_reason_are_read() -> None:
    chunk = read_line(b'data: {"choices": [{"index": 0, "delta": {"content": "SELECT"}, "finish_reason": "stop"}]}\n')
    assert chunk is not None
    assert (chunk.text, chunk.finish_reason, chunk.usage) == ("SELECT", "stop", None)


@pytest.mark.parametrize(
    "data",
    [
        '{"choices": [], "usage": {"completion_tokens": 7, "decoding": {"forward_passes": 3}}}',  # this server
        '{"choices": [], "usage": {"completion_tokens": 7}, "timings": {"predicted_n": 7}}',  # llama-server
        '{"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": {"completion_tokens": 7}}',  # transformers
    ],
)
def test_usage_is_read_wherever_it_stands(data: str) -> None:
    chunk = read_line(f"data: {data}\n".encode())
    assert chunk is not None
    assert chunk.usage is not None
    assert chunk.usage.completion_tokens == 7
    assert chunk.text == ""


def test_an_error_in_the_stream_is_kept() -> None:
    chunk = read_line(b'data: {"error": {"message": "the engine failed"}}\n')
    assert chunk is not None
    assert chunk.error == {"message": "the engine failed"}


def test_a_broken_chunk_is_an_error() -> None:
    with pytest.raises(msgspec.DecodeError):
        read_line(b"data: {broken\n")
