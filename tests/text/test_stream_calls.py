"""Laws of an output with calls of functions: where its text ends, and what of it is text at all."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm_core.request import FinishReason
from cllm_core.text.expected_answer import OutputSyntax
from cllm_core.text.stream import OutputText, TextDelta
from cllm_core.text.tools.formats import DEFAULT_FORMAT
from cllm_core.text.tools.functions import FunctionCall
from cllm_core.text.tools.reader import join_calls
from cllm_core.text.tools.skeleton import ToolFormat
from tests.text.factories import byte_level, id_of, make_codec
from tests.text.strategies import cut, cuts
from tests.text.test_stream import make_output
from tests.text.tool_functions import FUNCTIONS, SEQUENTIAL

TOKENIZER = byte_level()
SPECIAL = (
    "[TOOL_CALLS]",
    "[ARGS]",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁sep｜>",
    "<|tool_call|>",
    "<arg_key>",
    "</arg_value>",
)
TOKENIZER.add_special_tokens(list(SPECIAL))
CODEC = make_codec(TOKENIZER)
SPELLED = {id_of(TOKENIZER, text): text for text in SPECIAL}
CALLS = (FunctionCall("get", '{"text": "stop é"}'), FunctionCall("get", "{}"))
WRITTEN = DEFAULT_FORMAT.write(CALLS)


def encode(text: str) -> tuple[int, ...]:
    return tuple(CODEC.encode(text, add_special_tokens=False))


def make_text(stop: tuple[str, ...] = (), tool_format: ToolFormat = DEFAULT_FORMAT) -> OutputText:
    return OutputText(
        CODEC, stop=stop, syntax=OutputSyntax(tool_format=tool_format, functions=FUNCTIONS, spelled=SPELLED)
    )


def stream(pieces: list[tuple[int, ...]], stop: tuple[str, ...] = ()) -> tuple[OutputText, list[TextDelta]]:
    output_text = make_text(stop)
    deltas = [output_text.push(make_output(ids)) for ids in pieces]
    return output_text, [*deltas, output_text.push(make_output((), "stop"))]


def summary(deltas: list[TextDelta]) -> tuple[object, ...]:
    calls = join_calls([call for delta in deltas for call in delta.calls])
    logprobs = [entry for delta in deltas for entry in delta.logprobs]
    text = "".join(delta.text for delta in deltas)
    return text, calls, logprobs, [delta.finish_reason for delta in deltas if delta.finish_reason]


@settings(deadline=None)
@given(
    text=st.text("Hi é\n<tool_c>", max_size=12),
    stop=st.lists(st.text("Hi é\n<t", min_size=1, max_size=3), max_size=2).map(tuple),
    at=cuts(120),
)
def test_how_many_tokens_a_step_brings_changes_nothing(text: str, stop: tuple[str, ...], at: list[int]) -> None:
    token_ids = encode(text + WRITTEN)
    one_by_one, expected = stream([(token_id,) for token_id in token_ids], stop)
    in_chunks, deltas = stream(cut(token_ids, at), stop)
    assert summary(deltas) == summary(expected)
    assert in_chunks.num_tokens == one_by_one.num_tokens


@pytest.mark.parametrize("tool_format", SEQUENTIAL, ids=lambda form: form.first)
def test_special_tokens_of_the_format_are_read(tool_format: ToolFormat) -> None:
    output_text = make_text(tool_format=tool_format)
    delta = output_text.push(make_output(encode(tool_format.write(CALLS)), "stop"))
    assert (delta.text, join_calls(delta.calls)) == ("", CALLS)


def test_stop_strings_end_text_and_leave_calls_alone() -> None:
    _, deltas = stream([encode("I will." + WRITTEN)], stop=("stop", "tool_call"))
    assert summary(deltas)[:2] == ("I will.", CALLS)
    _, deltas = stream([encode("I stop." + WRITTEN)], stop=("stop",))
    assert summary(deltas)[:2] == ("I ", ())


def test_text_held_back_for_a_stop_string_is_given_before_a_call() -> None:
    _, deltas = stream([encode("I st"), encode(WRITTEN)], stop=("stop",))
    assert [delta.text for delta in deltas] == ["I ", "st", ""]
    assert summary(deltas)[1] == CALLS


def test_a_stop_string_may_end_in_text_held_back_to_the_end() -> None:
    output_text = make_text(stop=("d\n",))
    assert output_text.push(make_output(encode("end\n"), "length")).finish_reason == "stop"
    assert output_text.matched_stop == "d\n"


def test_logprobs_are_those_of_the_text() -> None:
    token_ids = encode("Yes. \n" + WRITTEN)
    delta = make_text().push(make_output(token_ids, "stop"))
    assert CODEC.decode([entry.token_id for entry in delta.logprobs]) == delta.text == "Yes."


@pytest.mark.parametrize("finish_reason", ["length", "stop"])
def test_a_draft_ends_where_a_call_begins(finish_reason: FinishReason) -> None:
    output_text = make_text(stop=("xyz",))
    first = output_text.push(make_output(encode("Yes, x"), draft_ids=encode("y." + WRITTEN)))
    second = output_text.push(make_output(encode("<tool_call>"), draft_ids=encode('\n{"name"')))
    last = output_text.push(make_output((), finish_reason))
    assert (first.text, first.draft) == ("Yes, ", "xy.")
    assert (second.text, second.draft) == ("x", "")
    assert (last.text, last.calls, last.finish_reason) == ("", (), finish_reason)


@pytest.mark.parametrize("tool_format", SEQUENTIAL, ids=lambda form: form.first)
def test_a_required_call_cut_before_its_name_gives_neither_text_nor_logprobs(tool_format: ToolFormat) -> None:
    calls = OutputSyntax(tool_format=tool_format, functions=FUNCTIONS, spelled=SPELLED, is_required=True)
    for end in range(len(tool_format.first) + 1):
        output_text = OutputText(CODEC, stop=("name",), syntax=calls)
        delta = output_text.push(make_output(encode(tool_format.first[:end]), "length"))
        assert (delta.text, delta.calls, delta.logprobs, delta.finish_reason) == ("", (), (), "length")


def test_a_step_tells_the_arguments_of_a_call_in_one_piece() -> None:
    delta = make_text().push(make_output(encode(WRITTEN), "stop"))
    assert [(call.index, call.name, call.arguments) for call in delta.calls] == [
        (0, "get", ""), (0, None, CALLS[0].arguments), (1, "get", ""), (1, None, CALLS[1].arguments),
    ]  # fmt: skip
