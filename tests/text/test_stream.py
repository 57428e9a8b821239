"""Laws of the text of one output."""

from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm_core.request import DecodingStats, FinishReason, RequestOutput, TokenLogprobs
from cllm_core.text.stream import OutputText, TextDelta
from tests.text import factories
from tests.text.strategies import cut, cuts

TOKENIZER = factories.byte_level()
CODEC = factories.make_codec(TOKENIZER)
END_ID = factories.id_of(TOKENIZER, factories.END)


def encode(text: str) -> tuple[int, ...]:
    return tuple(CODEC.encode(text, add_special_tokens=False))


def make_output(
    token_ids: tuple[int, ...],
    finish_reason: FinishReason | None = None,
    *,
    stop_token_id: int | None = None,
    draft_ids: tuple[int, ...] = (),
    has_logprobs: bool = True,
) -> RequestOutput:
    return RequestOutput(
        request_id="r",
        token_ids=token_ids,
        logprobs=tuple(TokenLogprobs(-float(token_id), (), ()) for token_id in token_ids) if has_logprobs else None,
        finish_reason=finish_reason,
        stop_token_id=stop_token_id,
        draft_ids=draft_ids,
        stats=DecodingStats(num_prompt_tokens=1),
    )


def stream(chunks: Sequence[tuple[int, ...]], stop: tuple[str, ...] = ()) -> tuple[OutputText, list[TextDelta]]:
    """Push one output per chunk; the last one ends by its length."""
    output_text = OutputText(CODEC, stop=stop)
    deltas = [output_text.push(make_output(chunk)) for chunk in chunks]
    return output_text, [*deltas, output_text.push(make_output((), "length"))]


def joined(deltas: Sequence[TextDelta]) -> tuple[object, ...]:
    text = "".join(delta.text for delta in deltas)
    token_ids = tuple(token_id for delta in deltas for token_id in delta.token_ids)
    logprobs = tuple(entry for delta in deltas for entry in delta.logprobs)
    return text, token_ids, logprobs, [delta.finish_reason for delta in deltas if delta.finish_reason]


@settings(deadline=None, max_examples=300)
@given(
    token_ids=st.lists(st.integers(0, 264), max_size=30).map(tuple),
    stop=st.lists(st.text("helowé 👍", min_size=1, max_size=3), max_size=3).map(tuple),
    at=cuts(30),
)
def test_how_many_tokens_a_step_brings_changes_nothing(
    token_ids: tuple[int, ...], stop: tuple[str, ...], at: list[int]
) -> None:
    one_by_one, expected = stream([(token_id,) for token_id in token_ids], stop)
    in_chunks, deltas = stream(cut(token_ids, at), stop)
    assert joined(deltas) == joined(expected)
    assert in_chunks.num_tokens == one_by_one.num_tokens
    assert in_chunks.matched_stop == one_by_one.matched_stop


@settings(deadline=None)
@given(text=st.text(), at=cuts(30))
def test_offsets_tell_where_the_text_of_each_token_begins(text: str, at: list[int]) -> None:
    token_ids = encode(text)
    _, deltas = stream(cut(token_ids, at))
    entries = [entry for delta in deltas for entry in delta.logprobs]
    assert tuple(entry.token_id for entry in entries) == token_ids
    for index, entry in enumerate(entries):
        assert entry.text_offset == len(CODEC.decode(token_ids[:index]))
        assert entry.logprobs.logprob == -float(entry.token_id)


@settings(deadline=None)
@given(token_ids=st.lists(st.integers(0, 264), max_size=30).map(tuple), at=cuts(30))
def test_log_probabilities_change_nothing_else(token_ids: tuple[int, ...], at: list[int]) -> None:
    with_them, without = OutputText(CODEC), OutputText(CODEC)
    for chunk in [*cut(token_ids, at), ()]:
        delta = with_them.push(make_output(chunk))
        assert without.push(make_output(chunk, has_logprobs=False)) == msgspec.structs.replace(delta, logprobs=())
    assert with_them.num_tokens == without.num_tokens


def test_a_stop_string_ends_the_output_in_the_middle_of_a_step() -> None:
    output_text = OutputText(CODEC, stop=("lo",))
    delta = output_text.push(make_output((*encode("say hello, "), *encode("w"))))
    assert (delta.text, delta.finish_reason) == ("say hel", "stop")
    assert output_text.matched_stop == "lo"
    assert output_text.num_tokens == len(encode("say hello"))
    assert CODEC.decode([entry.token_id for entry in delta.logprobs]) == "say hell"


def test_outputs_after_a_stop_string_are_empty() -> None:
    output_text = OutputText(CODEC, stop=("x",))
    output_text.push(make_output(encode("x")))
    assert output_text.push(make_output(encode("y"), "abort")) == TextDelta()
    assert output_text.finish_reason == "stop"


def test_a_stop_string_before_a_stop_token_of_the_same_step_ends_the_output() -> None:
    output_text = OutputText(CODEC, stop=("x",))
    delta = output_text.push(make_output((*encode("ax"), END_ID), "stop", stop_token_id=END_ID))
    assert (delta.text, delta.token_ids) == ("a", encode("ax"))
    assert output_text.matched_stop == "x"


@pytest.mark.parametrize("stop_token_id", [END_ID, encode("z")[0]])
def test_a_stop_token_is_counted_but_neither_text_nor_logprobs(stop_token_id: int) -> None:
    output_text = OutputText(CODEC)
    delta = output_text.push(make_output((*encode("ab"), stop_token_id), "stop", stop_token_id=stop_token_id))
    assert (delta.text, delta.finish_reason) == ("ab", "stop")
    assert [entry.token_id for entry in delta.logprobs] == list(encode("ab"))
    assert output_text.num_tokens == 3


def test_logprobs_wait_for_the_text_of_their_token() -> None:
    output_text = OutputText(CODEC, stop=("xyz",))
    first, second = (output_text.push(make_output(encode(text))) for text in ("axy", "b"))
    assert [(delta.text, len(delta.logprobs)) for delta in (first, second)] == [("a", 1), ("xyb", 3)]


@pytest.mark.parametrize("finish_reason", ["length", "abort", "error", "stop"])
def test_text_held_back_for_a_stop_string_is_given_at_another_end(finish_reason: FinishReason) -> None:
    output_text = OutputText(CODEC, stop=("xyz",))
    assert output_text.push(make_output(encode("axy"))).text == "a"
    delta = output_text.push(make_output((), finish_reason))
    assert (delta.text, delta.finish_reason, len(delta.logprobs)) == ("xy", finish_reason, 2)
    assert output_text.finished


def test_a_draft_follows_the_text_given_and_never_becomes_part_of_it() -> None:
    output_text = OutputText(CODEC, stop=("lower",))
    first = output_text.push(make_output(encode("hello w"), draft_ids=encode("orm")))
    second = output_text.push(make_output(encode("hel lo"), draft_ids=encode("wer")))
    last = output_text.push(make_output(encode("ng"), "length"))
    assert (first.text, first.draft) == ("hello w", "orm")
    assert (second.text, second.draft) == ("hel ", "lower")  # "lo" is held back, so the draft begins with it
    assert (last.text, last.draft) == ("long", "")


def test_a_character_begun_in_the_text_is_completed_by_the_draft_and_by_the_next_tokens() -> None:
    output_text = OutputText(CODEC)
    head, tail = encode("ü")
    delta = output_text.push(make_output((head,), draft_ids=(tail, *encode("x"))))
    assert (delta.text, delta.draft) == ("", "üx")
    assert output_text.push(make_output((tail,))).text == "ü"
