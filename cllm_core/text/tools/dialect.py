"""ToolDialect: how one loaded model is told of functions and calls them.

A chat template that knows tools and shows a format that we know is left to do its work. For every other model the
server itself describes the functions in the system message, so that any model can be offered some.
"""

from collections.abc import Collection, Mapping, Sequence

import msgspec

from cllm_core.errors import InvalidRequest
from cllm_core.text.chat_template import ChatTemplate
from cllm_core.text.codec import TextCodec
from cllm_core.text.provenance import ChatPrompt
from cllm_core.text.tools.conversation import Turn, describe, shorten_ids, spell_out, without_system
from cllm_core.text.tools.formats import DEFAULT_FORMAT, Function, ToolFormat, ToolFormatChoice, find_format
from cllm_core.text.tools.grammar import CallRules, Vocabulary, calls_grammar
from cllm_core.text.tools.reader import CallSyntax


class ToolDialect(msgspec.Struct, frozen=True, kw_only=True):
    """The tool format of a model and who writes it into prompts.

    Attributes:
        is_native: the chat template writes functions, calls and results.
        takes_system: the chat template takes a system message; only known where it is not native.
        spelled: special tokens of the format: id -> text.
    """

    tool_format: ToolFormat
    is_native: bool
    takes_system: bool
    vocabulary: Vocabulary
    spelled: dict[int, str]

    def syntax(self, functions: Sequence[Function], *, is_required: bool = False) -> CallSyntax:
        """How calls of these functions are read, in outputs that hold nothing else where `is_required`."""
        names = tuple(function.name for function in functions)
        return CallSyntax(tool_format=self.tool_format, names=names, spelled=self.spelled, is_required=is_required)

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
        """The prompt of a conversation in which these functions may be called; errors as ChatTemplate.render.

        InvalidRequest also where the arguments of a call are nested too deeply.
        """
        try:
            messages = [turn.as_message() for turn in self._told(turns, functions)]
        except ValueError as error:
            # The arguments were read where they were checked; further down the stack there is less room for depth.
            raise InvalidRequest(f"the arguments of a call cannot be read: {error}", param="messages") from error
        return template.render(
            messages,
            [function.as_tool() for function in functions] if functions and self.is_native else None,
            add_generation_prompt=add_generation_prompt,
            template_kwargs=template_kwargs,
        )

    def _told(self, turns: Sequence[Turn], functions: Sequence[Function]) -> Sequence[Turn]:
        if self.is_native:
            return shorten_ids(turns) if self.tool_format.has_short_ids else turns
        spelled = spell_out(turns, self.tool_format)
        if not functions:
            return spelled
        described = describe(spelled, functions, self.tool_format)
        return described if self.takes_system else without_system(described)


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
    marks = {text: i for text in tool_format.tokens if (i := codec.added_token_id(text)) is not None}
    visible_ids = codec.visible_added_ids.difference(marks.values(), end_ids)
    return ToolDialect(
        tool_format=tool_format,
        is_native=template is not None and template.handles_tools and shown is not None,
        takes_system=template is not None and _takes_system(template),
        vocabulary=Vocabulary(marks=marks, visible_ids=tuple(sorted(visible_ids))),
        spelled={token_id: text for text, token_id in marks.items() if codec.is_special(token_id)},
    )


def _takes_system(template: ChatTemplate) -> bool:
    probe = "What the system says."
    try:
        prompt = template.render([{"role": "system", "content": probe}, {"role": "user", "content": "Hi"}])
        return probe in prompt.text
    except InvalidRequest:
        return False
