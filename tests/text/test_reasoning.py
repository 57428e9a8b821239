"""Laws of reasoning: it is told from the answer however the text is cut, and a tag counts only where it is one."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm_core.text.marks import MARK, with_marks
from cllm_core.text.reasoning.formats import (
    REASONING_FORMATS,
    Reasoning,
    ReasoningFormat,
    ReasoningFormatChoice,
    expect_reasoning,
    find_reasoning_format,
)
from cllm_core.text.reasoning.reader import ReasoningReader
from tests.text.strategies import cut, cuts

TAGGED = [form for form in REASONING_FORMATS if not form.has_channels]
THINK = next(form for form in TAGGED if form.name == "think")
GRANITE = next(form for form in TAGGED if form.answer_start == "<response>")

each_format = pytest.mark.parametrize("form", TAGGED, ids=lambda form: f"{form.name} {form.start}")
texts = st.text(st.sampled_from("ab <>/think[]|\n"), max_size=20)


def read(form: ReasoningFormat, state: str, pieces: list[str], *, marks: bool = False) -> tuple[str, str]:
    reader = ReasoningReader(Reasoning(format=form, state=state), form.tokens if marks else ())  # type: ignore[arg-type]
    parts = [reader.push(piece) for piece in pieces]
    parts.append(reader.flush())
    return "".join(part.reasoning for part in parts), "".join(part.answer for part in parts)


def contains_tag(form: ReasoningFormat, text: str) -> bool:
    tags = (form.start, form.end, form.answer_start, form.answer_end)
    return any(tag and tag.strip() in text for tag in tags)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(TAGGED), texts, texts, st.sampled_from(["open", "possible"]), cuts(80))
def test_reasoning_and_answer_are_read_however_the_text_is_cut(
    form: ReasoningFormat, thought: str, answer: str, state: str, at: list[int]
) -> None:
    if contains_tag(form, thought + " " + answer):
        return
    opening = form.start if state == "possible" else ""
    text = f"{opening}{thought}{form.end}{answer}"
    assert read(form, state, cut(text, at)) == (thought.strip(), answer.lstrip())


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(TAGGED), texts, cuts(30))
def test_text_that_does_not_begin_with_a_tag_is_answer_to_its_last_character(
    form: ReasoningFormat, text: str, at: list[int]
) -> None:
    begins = text.lstrip().startswith(form.start) or contains_tag(form, text)
    if not begins:
        assert read(form, "possible", cut(text, at)) == ("", text)


@each_format
def test_reasoning_that_is_cut_is_reasoning(form: ReasoningFormat) -> None:
    text = f"{form.start}One, two"
    for end in range(len(form.start), len(text) + 1):
        assert read(form, "possible", [text[:end]]) == (text[len(form.start) : end].rstrip(), "")


def test_the_beginning_of_an_end_tag_that_is_cut_is_reasoning() -> None:
    assert read(THINK, "open", ["Hm.</thi"]) == ("Hm.</thi", "")
    assert read(THINK, "possible", ["<thi"]) == ("", "<thi")


@each_format
def test_tags_that_are_tokens_are_not_their_letters(form: ReasoningFormat) -> None:
    if not form.tokens:
        return
    start, end = with_marks(form.start, form.tokens), with_marks(form.end, form.tokens)
    thought = f"Is {form.end} a tag?"
    assert read(form, "possible", [f"{start}{thought}{end}No: {form.end}"], marks=True) == (thought, f"No: {form.end}")
    assert read(form, "possible", [f"{form.start} is a tag."], marks=True) == ("", f"{form.start} is a tag.")


def test_other_marks_are_text() -> None:
    text = f"{MARK}<think>Call {MARK}<tool_call>.{MARK}</think>And {MARK}<tool_call>."
    assert read(THINK, "possible", list(text), marks=True) == ("Call <tool_call>.", "And <tool_call>.")


@pytest.mark.parametrize(
    ("state", "text", "expected"),
    [
        ("possible", "<think>Hm.</think>\n<response>Yes.</response>", ("Hm.", "Yes.")),
        ("possible", "<response>Yes.\n</response>\n", ("", "Yes.")),
        ("open", "Hm.</think><response>Yes. </resp", ("Hm.", "Yes. </resp")),
        ("ended", "<response>Yes.</response>", ("", "Yes.")),
        ("ended", "Yes.</response>", ("", "Yes.")),
    ],
)
def test_tags_around_the_answer_are_no_part_of_it(state: str, text: str, expected: tuple[str, str]) -> None:
    assert read(GRANITE, state, [text]) == expected
    assert read(GRANITE, state, list(text)) == expected


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ content.split('</think>')[-1] }}", "think"),
        ("{{ '<think>\\n' }}", "think"),
        ("between <think></think> and <response></response>", "granite"),
        ("Here is my thought process:", "granite"),
        ("{{ '<think>' }}{{ content.split('<answer>')[1].split('</answer>')[0] }}", "hunyuan"),
        ("{{ '[THINK]' + chunk + '[/THINK]' }}", "mistral"),
        ("{%- set think_begin = '<seed:think>' %}", "seed"),
        ("{{ '◁think▷' }}", "kimi_vl"),
        ("{{ '<|channel>thought\\n<channel|>' }}", "gemma"),
        ("{{ '<|START_THINKING|>' }}", "command"),
        ("{{ '<|start|>assistant<|channel|>final<|message|>' }}", "harmony"),
        ("{{ messages }}", None),
        (None, None),
    ],
)
def test_a_chat_template_shows_its_format(template: str | None, name: str | None) -> None:
    found = find_reasoning_format("auto", template)
    assert (None if found is None else found.name) == name
    assert find_reasoning_format("none", template) is None


@pytest.mark.parametrize("chosen", ["think", "granite", "mistral", "harmony"])
def test_a_chosen_format_needs_no_template(chosen: ReasoningFormatChoice) -> None:
    for template in (None, "{{ messages }}", "[THINK] <think></think> Here is my thought process:"):
        found = find_reasoning_format(chosen, template)
        assert found is not None
        assert found.name == chosen


@pytest.mark.parametrize(
    ("form", "prompt", "state"),
    [
        (THINK, "<|im_start|>assistant\n", "possible"),
        (THINK, "<|im_start|>assistant\n<think>\n", "open"),
        (THINK, "<|im_start|>assistant\n<think>\n\n</think>\n\n", "ended"),
        (THINK, "<｜Assistant｜></think>", "ended"),
        (THINK, "What is <think>?<|im_end|>\n<|im_start|>assistant\n", "possible"),
        (GRANITE, "<think></think>\n<response>", "ended"),
        (find_reasoning_format("seed", None), "assistant\n<seed:think><seed:cot_budget_reflect>", "open"),
        (find_reasoning_format("gemma", None), "<|turn>model\n<|channel>thought\n<channel|>", "ended"),
        (find_reasoning_format("gemma", None), "<|turn>model\n<|channel>thought\n", "open"),
        (find_reasoning_format("harmony", None), "<|start|>assistant", "possible"),
        (find_reasoning_format("harmony", None), "<|start|>assistant<|channel|>analysis<|message|>", "open"),
    ],
)
def test_the_prompt_tells_whether_the_output_goes_on_with_reasoning(
    form: ReasoningFormat, prompt: str, state: str
) -> None:
    assert expect_reasoning(form, prompt).state == state
