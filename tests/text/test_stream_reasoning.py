"""Laws of an output with reasoning, token by token: what is whose, what is counted, and where stop strings act."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from cllm_core.request import FinishReason
from cllm_core.text.expected_answer import OutputSyntax
from cllm_core.text.reasoning.formats import Reasoning, find_reasoning_format
from cllm_core.text.stream import OutputText, TextDelta
from cllm_core.text.tools.formats import DEFAULT_FORMAT, find_format
from cllm_core.text.tools.functions import FunctionCall
from cllm_core.text.tools.reader import join_calls
from tests.text.factories import byte_level, id_of, make_codec
from tests.text.strategies import cut, cuts
from tests.text.test_stream import make_output
from tests.text.tool_functions import FUNCTIONS

TOKENIZER = byte_level()
TOKENIZER.add_tokens([AddedToken(text, special=False) for text in ("<think>", "</think>")])
HARMONY_TOKENS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>")
TOKENIZER.add_special_tokens(list(HARMONY_TOKENS))
CODEC = make_codec(TOKENIZER)
CALLS = (FunctionCall("get", '{"text": "stop é"}'), FunctionCall("get", "{}"))


def encode(text: str) -> tuple[int, ...]:
    return tuple(CODEC.encode(text, add_special_tokens=False))


def make_syntax(name: str, state: str = "possible", *, calls: bool = True) -> OutputSyntax:
    form = find_reasoning_format(name, None)  # type: ignore[arg-type]
    assert form is not None
    tool_format = find_format("harmony", None) if form.has_channels else DEFAULT_FORMAT
    assert tool_format is not None
    return OutputSyntax(
        tool_format=tool_format,
        functions=FUNCTIONS if calls else (),
        reasoning=Reasoning(format=form, state=state),  # type: ignore[arg-type]
        marks={id_of(TOKENIZER, text): text for text in form.tokens},
    )


THINK, HARMONY = make_syntax("think"), make_syntax("harmony")
THOUGHT = "<think>\nIs é it </think>?"  # its last tag is spelled in letters below
ANALYSIS = "<|channel|>analysis<|message|>Is é it?<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>"


def stream(
    pieces: list[tuple[int, ...]], syntax: OutputSyntax, *, stop: tuple[str, ...] = (), end: FinishReason = "stop"
) -> tuple[OutputText, list[TextDelta]]:
    text = OutputText(CODEC, stop=stop, syntax=syntax)
    deltas = [text.push(make_output(ids)) for ids in pieces]
    return text, [*deltas, text.push(make_output((), end))]


def summary(text: OutputText, deltas: list[TextDelta]) -> tuple[object, ...]:
    return (
        "".join(delta.reasoning for delta in deltas),
        "".join(delta.text for delta in deltas),
        join_calls([call for delta in deltas for call in delta.calls]),
        [entry for delta in deltas for entry in delta.logprobs],
        [delta.finish_reason for delta in deltas if delta.finish_reason],
        (text.num_tokens, text.num_reasoning_tokens),
    )


pieces_of_text = st.text("Hi é\n<t", max_size=10)
stops = st.lists(st.text("Hi é\n<t", min_size=1, max_size=3), max_size=2).map(tuple)


@settings(deadline=None)
@given(thought=pieces_of_text, text=pieces_of_text, stop=stops, at=cuts(150), has_thought=st.booleans())
def test_how_many_tokens_a_step_brings_changes_nothing(
    thought: str, text: str, stop: tuple[str, ...], at: list[int], has_thought: bool
) -> None:
    written = f"<think>{thought}</think>{text}" if has_thought else text
    token_ids = encode(written + DEFAULT_FORMAT.write(CALLS))
    expected = summary(*stream([(token_id,) for token_id in token_ids], THINK, stop=stop))
    assert summary(*stream(cut(token_ids, at), THINK, stop=stop)) == expected


@settings(deadline=None)
@given(thought=pieces_of_text, text=pieces_of_text, stop=stops, at=cuts(150), calls=st.booleans())
def test_the_same_holds_for_messages_on_channels(
    thought: str, text: str, stop: tuple[str, ...], at: list[int], calls: bool
) -> None:
    last = '<|channel|>commentary to=functions.get <|constrain|>json<|message|>{"text": "é"}' if calls else FINAL + text
    written = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant{last}"
    token_ids = encode(written)
    expected = summary(*stream([(token_id,) for token_id in token_ids], HARMONY, stop=stop))
    assert summary(*stream(cut(token_ids, at), HARMONY, stop=stop)) == expected


@pytest.mark.parametrize(
    ("syntax", "written", "num_reasoning"),
    [
        (THINK, "<think>\nIs é it?\n</think>\n\nYes.", len(encode("<think>\nIs é it?\n</think>"))),
        (make_syntax("think", "open"), "Is é it?</think>Yes.", len(encode("Is é it?</think>"))),
        (THINK, "\n<think>Is é it?</think>Yes.", len(encode("\n<think>Is é it?</think>"))),
        (HARMONY, ANALYSIS + FINAL + "Yes.", len(encode("<|channel|>analysis<|message|>Is é it?<|end|>"))),
        (
            make_syntax("harmony", "open"),
            "Is é it?<|end|><|start|>assistant" + FINAL + "Yes.",
            len(encode("Is é it?")) + 1,
        ),
    ],
)
def test_reasoning_tokens_are_counted_with_their_tags(syntax: OutputSyntax, written: str, num_reasoning: int) -> None:
    text, deltas = stream([encode(written)], syntax)
    assert summary(text, deltas)[:2] == ("Is é it?", "Yes.")
    assert (text.num_tokens, text.num_reasoning_tokens) == (len(encode(written)), num_reasoning)


@pytest.mark.parametrize("syntax", [THINK, make_syntax("think", calls=False)], ids=["calls", "no calls"])
def test_an_output_without_reasoning_is_all_content(syntax: OutputSyntax) -> None:
    text, deltas = stream([encode("\nYes <think>.")], syntax)
    assert summary(text, deltas)[:2] == ("", "\nYes <think>.")
    assert text.num_reasoning_tokens == 0


def test_stop_strings_do_nothing_within_reasoning() -> None:
    for syntax, before in (
        (THINK, "<think>No stop.</think>"),
        (HARMONY, ANALYSIS.replace("Is é it?", "No stop.") + FINAL),
    ):
        _, deltas = stream([encode(before + "I stop.")], syntax, stop=("stop",))
        assert [("".join(d.reasoning for d in deltas)), "".join(d.text for d in deltas)] == ["No stop.", "I "]


def test_logprobs_are_those_of_the_content() -> None:
    for syntax, before in ((THINK, "<think>\nHm.\n</think>\n\n"), (HARMONY, ANALYSIS + FINAL), (THINK, "")):
        token_ids = encode(before + "Yes é.")
        for pieces in ([token_ids], [(token_id,) for token_id in token_ids]):
            text = OutputText(CODEC, syntax=syntax)
            deltas = [text.push(make_output(ids)) for ids in pieces]
            entries = [entry for delta in deltas for entry in delta.logprobs]
            assert CODEC.decode([entry.token_id for entry in entries]) == "Yes é."
            assert [entry.text_offset for entry in entries][:2] == [0, 1]


def test_a_draft_shows_content_only() -> None:
    text = OutputText(CODEC, syntax=THINK)
    assert text.push(make_output(encode("<think>Hm"), draft_ids=encode(".</think>Yes"))).draft == ""
    assert text.push(make_output(encode(".</think>Yes"), draft_ids=encode(", of<think>"))).draft == ", of"


@pytest.mark.parametrize("finish_reason", ["length", "stop"])
def test_reasoning_that_does_not_end_is_given_to_its_last_character(finish_reason: FinishReason) -> None:
    for syntax, before in ((THINK, "<think>"), (HARMONY, "<|channel|>analysis<|message|>")):
        text, deltas = stream([encode(before + "Hm. </")], syntax, end=finish_reason)
        assert summary(text, deltas)[:2] == ("Hm. </", "")
        assert deltas[-1].finish_reason == finish_reason


def spelled(text: str) -> tuple[int, ...]:
    """The text in letters, tokens of the format too."""
    return tuple(token_id for char in text for token_id in encode(char))


@pytest.mark.parametrize("tag", ["<|end|>", "<|channel|>analysis<|message|>", "<|start|>assistant"])
def test_marks_of_channels_in_letters_are_text(tag: str) -> None:
    token_ids = (*encode(ANALYSIS + FINAL), *spelled(f"It writes {tag}."))
    assert summary(*stream([token_ids], HARMONY))[:2] == ("Is é it?", f"It writes {tag}.")


@pytest.mark.parametrize(
    ("written", "reasoning", "content", "calls"),
    [
        (FINAL + "Hi.", "", "Hi.", ()),
        (ANALYSIS + ANALYSIS + FINAL + "Hi.", "Is é it?\n\nIs é it?", "Hi.", ()),
        (
            ANALYSIS + "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant"
            '<|channel|>commentary to=functions.get <|constrain|>json<|message|>{"text": "x"}',
            "Is é it?",
            "I look.",
            (FunctionCall("get", '{"text": "x"}'),),
        ),
        (
            ANALYSIS + ' to=functions.get<|channel|>commentary json<|message|>{"text": "x"}',
            "Is é it?",
            "",
            (FunctionCall("get", '{"text": "x"}'),),
        ),
        ("<|channel|>commentary to=functions.other json<|message|>{}", "", "{}", ()),
        (ANALYSIS.removesuffix("<|start|>assistant"), "Is é it?", "", ()),
        ("<|channel|>fin", "", "", ()),
        ("Hello", "", "Hello", ()),
    ],
)
def test_messages_are_told_by_their_channel_and_recipient(
    written: str, reasoning: str, content: str, calls: tuple[FunctionCall, ...]
) -> None:
    token_ids = encode(written)
    for at in ([], list(range(len(token_ids)))):
        assert summary(*stream(cut(token_ids, at), HARMONY))[:3] == (reasoning, content, calls)


def test_reasoning_may_be_part_of_the_content() -> None:
    syntax = make_syntax("harmony")
    text = OutputText(
        CODEC,
        syntax=OutputSyntax(
            tool_format=syntax.tool_format, reasoning=syntax.reasoning, marks=syntax.marks, separates_reasoning=False
        ),
    )
    delta = text.push(make_output(encode(ANALYSIS + FINAL + "Yes."), "stop"))
    assert (delta.reasoning, delta.text) == ("", "Is é it?\n\nYes.")
