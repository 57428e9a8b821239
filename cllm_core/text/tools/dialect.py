"""ToolDialect: how one loaded model is told of functions and calls them.

A chat template that writes functions, calls and results in a format that we know is left to do so. What it does not
write is put into the messages as text, so that any model can be offered functions.
"""

from collections.abc import Collection, Mapping, Sequence

import msgspec

from cllm_core.text.chat_template import ChatTemplate
from cllm_core.text.codec import TextCodec
from cllm_core.text.lark import Vocabulary
from cllm_core.text.provenance import ChatPrompt
from cllm_core.text.tools.conversation import (
    Turn,
    describe,
    functions_text,
    separate_calls,
    shorten_ids,
    with_system,
    without_system,
    write_calls,
    write_results,
)
from cllm_core.text.tools.formats import DEFAULT_FORMAT, find_format
from cllm_core.text.tools.functions import Function
from cllm_core.text.tools.grammar import CallRules, calls_grammar
from cllm_core.text.tools.reader import CallSyntax
from cllm_core.text.tools.skeleton import ToolFormat, ToolFormatChoice
from cllm_core.text.tools.template_support import TemplateSupport, find_support


class ToolDialect(msgspec.Struct, frozen=True, kw_only=True):
    """The tool format of a model and who writes it into prompts.

    Attributes:
        support: what the chat template writes itself, in this format.
        spelled: special tokens of the format: id -> text.
    """

    tool_format: ToolFormat
    support: TemplateSupport
    vocabulary: Vocabulary
    spelled: dict[int, str]

    def syntax(self, functions: Sequence[Function], *, is_required: bool = False) -> CallSyntax:
        """How calls of these functions are read, in outputs that hold nothing else where `is_required`."""
        return CallSyntax(
            tool_format=self.tool_format, functions=tuple(functions), spelled=self.spelled, is_required=is_required
        )

    def grammar(self, rules: CallRules) -> str:
        """What an output has to match, for SamplingParams.grammar; errors as `calls_grammar`."""
        return calls_grammar(self.tool_format, rules, self.vocabulary)

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
            turn.as_message(arguments_as_text=support.arguments_as_text, null_content=support.null_content)
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
    template: ChatTemplate | None, codec: TextCodec, *, chosen: ToolFormatChoice, end_ids: Collection[int]
) -> ToolDialect:
    """The dialect of a model.

    Args:
        template: None where the checkpoint has none.
        chosen: a format, or "auto" for the one that the template shows.
        end_ids: tokens that end an output.
    """
    shown = find_format(chosen, None if template is None else template.source)
    tool_format = shown or DEFAULT_FORMAT
    support = find_support(template)
    if shown is None:
        # It writes functions and calls in a format that could not be read.
        support = TemplateSupport(system=support.system)
    marks = {text: i for text in tool_format.tokens if (i := codec.added_token_id(text)) is not None}
    visible_ids = codec.visible_added_ids.difference(marks.values(), end_ids)
    return ToolDialect(
        tool_format=tool_format,
        support=support,
        vocabulary=Vocabulary(marks=marks, visible_ids=tuple(sorted(visible_ids))),
        spelled={token_id: text for text, token_id in marks.items() if codec.is_special(token_id)},
    )
