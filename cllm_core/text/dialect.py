"""Dialect: how one loaded model is told of functions, calls them, and reasons before it answers.

A chat template that writes functions, calls and results in a format that we know is left to do so. What it does not
write is put into the messages as text, so that any model can be offered functions.
"""

from collections.abc import Collection, Mapping, Sequence

import msgspec

from cllm_core.text.chat_template import ChatTemplate
from cllm_core.text.codec import TextCodec
from cllm_core.text.expected_answer import ExpectedAnswer
from cllm_core.text.lark import Vocabulary
from cllm_core.text.provenance import ChatPrompt
from cllm_core.text.reasoning.formats import (
    ReasoningFormat,
    ReasoningFormatChoice,
    expect_reasoning,
    find_reasoning_format,
)
from cllm_core.text.tools.conversation import (
    Turn,
    describe,
    functions_text,
    join_reasoning,
    separate_calls,
    shorten_ids,
    with_system,
    without_system,
    write_calls,
    write_results,
)
from cllm_core.text.tools.formats import DEFAULT_FORMAT, find_format
from cllm_core.text.tools.functions import Function
from cllm_core.text.tools.skeleton import ToolFormat, ToolFormatChoice
from cllm_core.text.tools.template_support import TemplateSupport, find_support, writes_calls_in


class Dialect(msgspec.Struct, frozen=True, kw_only=True):
    """The formats of a model and who writes them into prompts.

    Attributes:
        support: what the chat template writes itself, in these formats.
        reasoning: None where outputs are not looked at for reasoning.
        separates_reasoning: it is told from content, else it is part of it.
        call_vocabulary: of grammars for calls.
        reasoning_vocabulary: of grammars for what comes before the answer.
        spelled: special tokens that structure calls: id -> text.
        marks: tokens that structure reasoning: id -> text.
    """

    tool_format: ToolFormat
    support: TemplateSupport
    reasoning: ReasoningFormat | None
    separates_reasoning: bool
    call_vocabulary: Vocabulary
    reasoning_vocabulary: Vocabulary
    spelled: dict[int, str]
    marks: dict[int, str]

    def answer_to(self, prompt: str, *, continued: str | None = None) -> ExpectedAnswer:
        """What the answer to a prompt may look like.

        Args:
            continued: text of the answer that the prompt has begun with, None where it has begun none.
        """
        return ExpectedAnswer(
            tool_format=self.tool_format,
            reasoning=None if self.reasoning is None else expect_reasoning(self.reasoning, prompt, continued),
            separates_reasoning=self.separates_reasoning,
            call_vocabulary=self.call_vocabulary,
            reasoning_vocabulary=self.reasoning_vocabulary,
            spelled=self.spelled,
            marks=self.marks,
        )

    def render(
        self,
        template: ChatTemplate,
        turns: Sequence[Turn],
        functions: Sequence[Function],
        *,
        add_generation_prompt: bool,
        template_kwargs: Mapping[str, object] | None,
    ) -> ChatPrompt:
        """The prompt of a conversation in which these functions may be called; errors as ChatTemplate.render."""
        support = self.support
        messages = [
            turn.as_message(
                arguments_as_text=support.arguments_as_text,
                null_content=support.null_content,
                reasoning_fields=support.reasoning_fields,
            )
            for turn in self._told(turns, functions)
        ]
        if support.functions_in_system and not support.functions and functions:
            messages[0] |= {"tools": functions_text(functions)}
        return template.render(
            messages,
            [function.as_tool() for function in functions] if functions and support.functions else None,
            add_generation_prompt=add_generation_prompt,
            template_kwargs=template_kwargs,
        )

    def _told(self, turns: Sequence[Turn], functions: Sequence[Function]) -> Sequence[Turn]:
        """The conversation with what the template does not write itself as text."""
        support = self.support
        if support.one_call:
            turns = separate_calls(turns)
        if self.tool_format.has_channels:
            turns = join_reasoning(turns)
        if not support.calls:
            turns = write_calls(turns, self.tool_format)
        if not support.results:
            turns = write_results(turns)
        if self.tool_format.has_short_ids:
            turns = shorten_ids(turns)
        if not functions or support.functions:
            return turns
        if support.functions_in_system:
            return with_system(turns)
        described = describe(turns, functions, self.tool_format)
        return described if support.system else without_system(described)


def find_dialect(
    template: ChatTemplate | None,
    codec: TextCodec,
    *,
    tool_format: ToolFormatChoice = "auto",
    reasoning_format: ReasoningFormatChoice = "auto",
    end_ids: Collection[int],
) -> Dialect:
    """The dialect of a model.

    Args:
        template: None where the checkpoint has none.
        tool_format, reasoning_format: a format, or "auto" for the one that the template shows.
        end_ids: tokens that end an output.
    """
    source = None if template is None else template.source
    shown = find_format(tool_format, source)
    support = find_support(template)
    if template is not None and shown is not None and tool_format == "auto" and support.calls:
        shown = shown if writes_calls_in(template, shown) else None
    calls = shown or DEFAULT_FORMAT
    if shown is None:
        # It writes functions and calls in a format that could not be read.
        support = TemplateSupport(system=support.system, reasoning_fields=support.reasoning_fields)
    # Where calls are on channels, so is reasoning, and where they are not, it cannot be.
    reasoning = find_reasoning_format("harmony" if calls.has_channels else reasoning_format, source)
    if reasoning is not None and reasoning.has_channels and not calls.has_channels:
        reasoning = None
    call_marks = _added_tokens(calls.tokens, codec)
    marks = {} if reasoning is None else _added_tokens(reasoning.tokens, codec)
    visible_ids = codec.visible_added_ids.difference(end_ids)
    return Dialect(
        tool_format=calls,
        support=support,
        reasoning=reasoning,
        separates_reasoning=reasoning_format != "none",
        call_vocabulary=_vocabulary(call_marks, visible_ids),
        reasoning_vocabulary=_vocabulary(marks, visible_ids),
        spelled={token_id: text for text, token_id in call_marks.items() if codec.is_special(token_id)},
        marks={token_id: text for text, token_id in marks.items()},
    )


def _added_tokens(texts: Sequence[str], codec: TextCodec) -> dict[str, int]:
    return {text: token_id for text in texts if (token_id := codec.added_token_id(text)) is not None}


def _vocabulary(marks: Mapping[str, int], visible_ids: Collection[int]) -> Vocabulary:
    return Vocabulary(marks=marks, visible_ids=tuple(sorted(set(visible_ids).difference(marks.values()))))
