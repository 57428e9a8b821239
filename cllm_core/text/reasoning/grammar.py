"""Grammars that wait: an output may reason first, freely, and has to match its grammar behind the end of that.

The grammar itself lets the reasoning through, so the engine knows nothing of it: masks of free text cost next to
nothing.
"""

from collections.abc import Iterator

from cllm_core.text.lark import Vocabulary, text_up_to
from cllm_core.text.reasoning.formats import Reasoning

# White space that may stand between reasoning and answer; bounded, as a model might write it without end.
_GAP = r"gap: /[ \t\r\n]{1,8}/"


def behind_reasoning(grammar: str, expected: Reasoning, vocabulary: Vocabulary, *, is_free: bool) -> str:
    """The grammar of an output whose answer matches `grammar`, for formats with tags.

    Args:
        vocabulary: marks of the reasoning's format among its marks.
        is_free: the output may end within its reasoning, as it may end anywhere; else there has to be an answer.
    """
    return "\n".join(_rules(grammar, expected, vocabulary, is_free=is_free))


def _rules(grammar: str, expected: Reasoning, vocabulary: Vocabulary, *, is_free: bool) -> Iterator[str]:
    tags = expected.format
    reasoning = "thought | thought thought_end answer" if is_free else "thought thought_end answer"
    match expected.state:
        case "open":
            yield f"start: {reasoning}"
        case "possible":
            yield f"start: gap? {vocabulary.literal(tags.start)} ({reasoning}) | answer"
        case "ended":
            yield "start: answer"
    opening = f"({vocabulary.literal(tags.answer_start)} gap?)?" if tags.answer_start else ""
    closing = f"(gap? {vocabulary.literal(tags.answer_end)})?" if tags.answer_end else ""
    yield f"answer: gap? {opening} body {closing}"
    yield f"body: %lark {{\n{grammar}\n}}"
    yield _GAP
    if expected.state != "ended":
        end_id = vocabulary.marks.get(vocabulary.leading_mark(tags.end) or "")
        visible_ids = {*vocabulary.visible_ids, *vocabulary.marks.values()} - {end_id}
        yield from text_up_to(
            "thought", tags.end, vocabulary, visible_ids=sorted(i for i in visible_ids if i is not None)
        )
