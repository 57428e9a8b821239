"""Chat templates: messages to prompt text, as transformers' apply_chat_template renders them but without transformers.

What the conversation says is marked as the client's text all the way through the template, so that the codec can keep
it from becoming control tokens.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Self

from jinja2 import TemplateError, TemplateSyntaxError, meta

from cllm_core.errors import ConfigError, InvalidRequest
from cllm_core.info import TokenizerBundle
from cllm_core.text.content_forms import ContentForms, Message, find_content_forms
from cllm_core.text.provenance import ChatPrompt, from_client, to_prompt
from cllm_core.text.template_environment import TemplateEnvironment

# Variables by which templates turn reasoning on and off (Qwen 3 and GLM 4.5; DeepSeek V3.1 and Granite) and measure it.
_REASONING_SWITCHES = ("enable_thinking", "thinking")
_REASONING_EFFORT = "reasoning_effort"

# What template code can raise on data it was not written for: Jinja's own errors, and Python's from its expressions.
_RENDER_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class ChatTemplate:
    """A model's chat template, or the two that it has, one of them for tools; threads may share it."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, str] | None = None, *, tool_use: str | None = None
    ) -> None:
        """Compile the template.

        Args:
            source: Jinja text.
            special_tokens: name -> text, variables of the template (bos_token, ...).
            tool_use: Jinja text of another template, which is used where tools are given.

        Raises:
            ConfigError: a source is no valid template.
        """
        self._default = _Template(source, special_tokens or {})
        self._tool_use = self._default if tool_use is None else _Template(tool_use, special_tokens or {})

    @classmethod
    def of(cls, bundle: TokenizerBundle) -> Self | None:
        """The template of a model, None where it has none; errors as the constructor."""
        if bundle.chat_template is None:
            return None
        return cls(bundle.chat_template, bundle.special_tokens, tool_use=bundle.tool_use_template)

    @property
    def source(self) -> str:
        """Jinja text of the template that is used where tools are given."""
        return self._tool_use.source

    @property
    def handles_tools(self) -> bool:
        """Whether the template tells the model of tools."""
        return "tools" in self._tool_use.variables

    @property
    def variables(self) -> frozenset[str]:
        """Names that the template looks up (messages, enable_thinking, ...)."""
        return self._default.variables | self._tool_use.variables

    def reasoning_kwargs(self, *, effort: str | None = None, is_enabled: bool | None = None) -> dict[str, object]:
        """Template variables that tell the model how much to reason: only those that the template looks up.

        Args:
            effort: "none", "low", "high" and the like, as the client gave it; None leaves it to the template.
            is_enabled: whether to reason at all; None: unless the effort is "none".
        """
        if is_enabled is None and effort is not None:
            is_enabled = effort != "none"
        wishes = {**dict.fromkeys(_REASONING_SWITCHES, is_enabled), _REASONING_EFFORT: effort}
        return {name: wish for name, wish in wishes.items() if wish is not None and name in self.variables}

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, object]] | None = None,
        *,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, object] | None = None,
    ) -> ChatPrompt:
        """Return the prompt, special tokens such as bos included.

        Args:
            messages: plain data, as parsed from JSON. A content is a text or a list of parts of type text; the template
                is given the form that it was written for.
            tools: JSON schemas of the functions that the model may call.
            add_generation_prompt: end with what opens the assistant's turn.
            template_kwargs: further variables, as the client gave them (enable_thinking, documents, ...).

        Raises:
            InvalidRequest: the template refuses these messages or fails on them, or template_kwargs names a variable
                that is not the client's to set.
        """
        template = self._default if tools is None else self._tool_use
        template.check_free(template_kwargs or {})
        try:
            return template.render(
                template.fit(messages),
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                template_kwargs=template_kwargs or {},
            )
        except _RENDER_ERRORS as error:
            raise InvalidRequest(f"the chat template refuses these messages: {error}", param="messages") from error


class _Template:
    """One compiled template."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        environment = TemplateEnvironment()
        try:
            tree = environment.parse(source)
            self.variables = frozenset(meta.find_undeclared_variables(tree))
            self._compiled = environment.template(tree)
        except TemplateSyntaxError as error:
            complaint = str(error.message).rstrip(".")
            raise ConfigError(
                f"chat template, line {error.lineno}: {complaint}; correct it (Jinja, as transformers reads it)"
            ) from error
        self._reserved = {"messages", "tools", "add_generation_prompt", *special_tokens, *environment.globals}

    def check_free(self, template_kwargs: Mapping[str, object]) -> None:
        """Raise InvalidRequest where a variable is not the client's to set."""
        if taken := sorted(self._reserved.intersection(template_kwargs)):
            raise InvalidRequest(
                f"chat_template_kwargs sets {', '.join(taken)}: reserved for the server, leave it out",
                param="chat_template_kwargs",
            )

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, object] | None = None,
    ) -> ChatPrompt:
        """The prompt of messages in the form that the template takes; raises _RENDER_ERRORS."""
        variables = {"documents": None, **from_client(template_kwargs or {}), **self._special_tokens}
        text = self._compiled.render(
            variables,
            messages=[_marked(message) for message in messages],
            tools=from_client(tools),
            add_generation_prompt=add_generation_prompt,
        )
        return to_prompt(text)

    def fit(self, messages: Sequence[Message]) -> list[Message]:
        """The messages, each content in a form that the template takes."""
        return [self._content_forms.fit(message) for message in messages]

    @cached_property
    def _content_forms(self) -> ContentForms:
        return find_content_forms(self._try)

    def _try(self, messages: Sequence[Message]) -> str | None:
        try:
            return self.render(messages).text
        except _RENDER_ERRORS:
            return None


def _marked(message: Message) -> Message:
    """The message, its texts marked as the client's.

    Not its role: that is structure, and some templates make control tokens of it ('<|' + message.role + '|>').
    """
    role = message.get("role")
    marked = from_client(message)
    return {**marked, "role": role} if isinstance(role, str) and role.isidentifier() else marked
