"""Chunks with nothing but text: shaped once, filled in, and still what the schema would have written."""

import pytest

from server.generation.choices import ChoiceDelta
from server.openai.chat.answer import ChunkChoice, Delta
from server.openai.shared.text_frames import TextFrames, as_json

TEXTS = ["a", 'say "\\n"', "line\nbreak\r\u2028\x00\x1f\x7f", "über 日本 🙂", "</data>: {}", '"text"']


def make_delta(text: str, *, index: int = 0) -> ChoiceDelta:
    return ChoiceDelta(index=index, is_first=False, text=text, logprobs=(), finish_reason=None)


def shape(delta: ChoiceDelta) -> ChunkChoice:
    return ChunkChoice(index=delta.index, delta=Delta(content=delta.text), logprobs=None, finish_reason=None)


@pytest.mark.parametrize("text", TEXTS)
def test_a_filled_frame_is_the_json_that_the_schema_writes(text: str) -> None:
    frames = TextFrames(shape)
    frames.chunk(make_delta("the first makes the frame"))
    assert frames.chunk(make_delta(text)) == as_json(shape(make_delta(text)))


def test_each_choice_has_a_frame_of_its_own() -> None:
    frames = TextFrames(shape)
    deltas = [make_delta("x", index=index) for index in (1, 0, 1)]
    assert [frames.chunk(delta) for delta in deltas] == [as_json(shape(delta)) for delta in deltas]


def test_a_delta_with_more_than_text_does_not_fit_a_frame() -> None:
    delta = make_delta("x")
    assert delta.is_text_only
    assert not make_delta("").is_text_only
    assert not ChoiceDelta(index=0, is_first=True, text="x", logprobs=(), finish_reason=None).is_text_only
    assert not ChoiceDelta(index=0, is_first=False, text="x", logprobs=(), finish_reason="stop").is_text_only
    assert not ChoiceDelta(0, is_first=False, text="x", logprobs=(), finish_reason=None, draft="").is_text_only
    assert not ChoiceDelta(0, is_first=False, text="x", logprobs=(), finish_reason=None, token_ids=()).is_text_only
