"""What the answer to one prompt may look like: how it is read, and the grammar that it has to match."""

from collections.abc import Mapping, Sequence

import msgspec

from cllm_core.text.harmony import HarmonyReader, harmony_grammar
from cllm_core.text.lark import Excluded, Vocabulary
from cllm_core.text.output import OutputReader, PartsReader
from cllm_core.text.reasoning.formats import Reasoning
from cllm_core.text.reasoning.grammar import behind_reasoning
from cllm_core.text.reasoning.reader import ReasoningReader
from cllm_core.text.tools.functions import Function
from cllm_core.text.tools.grammar import CallRules, calls_grammar
from cllm_core.text.tools.reader import CallReader
from cllm_core.text.tools.skeleton import ToolFormat


class OutputSyntax(msgspec.Struct, frozen=True, kw_only=True):
    """How one output is read.

    Attributes:
        tool_format: of the calls that are read.
        functions: that may be called; none where no calls are read.
        is_required: the output is calls and has no content, as CallRules says.
        reasoning: None where none is expected.
        separates_reasoning: it is told from content, else it is part of it.
        spelled: special tokens that structure calls: id -> text.
        marks: tokens that structure reasoning: id -> text.
    """

    tool_format: ToolFormat
    functions: tuple[Function, ...] = ()
    is_required: bool = False
    reasoning: Reasoning | None = None
    separates_reasoning: bool = True
    spelled: Mapping[int, str] = {}
    marks: Mapping[int, str] = {}

    @property
    def may_call(self) -> bool:
        """Whether functions may be called, so that there may be no content."""
        return bool(self.functions)

    def reader(self) -> OutputReader:
        """A reader of one output."""
        marks = frozenset(self.marks.values())
        if self.reasoning is not None and self.reasoning.format.has_channels:
            return HarmonyReader(
                self.reasoning,
                self.functions,
                marks,
                is_required=self.is_required,
                separates=self.separates_reasoning,
            )
        calls = None
        if self.functions:
            calls = CallReader(self.tool_format, self.functions, is_required=self.is_required)
        return PartsReader(None if self.reasoning is None else ReasoningReader(self.reasoning, marks), calls)


class ExpectedAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The formats of a model, and what a prompt lets expect; attributes as in Dialect and OutputSyntax."""

    tool_format: ToolFormat
    reasoning: Reasoning | None
    separates_reasoning: bool
    call_vocabulary: Vocabulary
    reasoning_vocabulary: Vocabulary
    spelled: dict[int, str]
    marks: dict[int, str]

    def syntax(self, functions: Sequence[Function] = (), *, is_required: bool = False) -> OutputSyntax | None:
        """How the answer is read, None where it is nothing but text.

        Args:
            functions: that it may call.
            is_required: it has to call one.
        """
        if not functions and self.reasoning is None:
            return None
        return OutputSyntax(
            tool_format=self.tool_format,
            functions=tuple(functions),
            is_required=is_required,
            reasoning=self.reasoning,
            separates_reasoning=self.separates_reasoning,
            spelled=self.spelled if functions else {},
            marks=self.marks,
        )

    def grammar(self, rules: CallRules | None, content: str | None) -> str:
        """What the answer has to match, for SamplingParams.grammar. Reasoning may come before it.

        Args:
            rules: of the calls that it may make, None for none.
            content: grammar of text, or of text in the place of calls; None leaves text free, where there are rules.

        Raises:
            InvalidRequest: as `calls_grammar`.
        """
        expected = self.reasoning
        if expected is not None and expected.format.has_channels:
            return harmony_grammar(self.tool_format, rules, content, expected, self.reasoning_vocabulary)
        answer = (content or "") if rules is None else self._calls_grammar(rules, content)
        if expected is None or expected.is_over:
            return answer
        is_free = content is None and rules is not None and not rules.is_required
        return behind_reasoning(answer, expected, self.reasoning_vocabulary, is_free=is_free)

    def _calls_grammar(self, rules: CallRules, content: str | None) -> str:
        not_first = None
        if self.reasoning is not None and self.reasoning.state == "possible":
            start = self.reasoning.format.start
            not_first = Excluded(start, self.reasoning_vocabulary.leading_id(start))
        rules = msgspec.structs.replace(rules, content=content)
        return calls_grammar(self.tool_format, rules, self.call_vocabulary, not_first=not_first)
