"""Chat templates: messages to prompt text, with the Jinja dialect of transformers but without transformers.

Templates come with the checkpoint, hence from strangers: they run in Jinja's sandbox and see plain data only.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import NoReturn

from jinja2 import Environment, TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from cllm_core.errors import ConfigError, InvalidRequest

# What template code can raise on data it was not written for: Jinja's own errors, and Python's from its expressions.
_RENDER_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class ChatTemplate:
    """One compiled chat template; threads may share it."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        """Compile the template.

        Args:
            source: Jinja text.
            special_tokens: name -> text, variables of the template (bos_token, ...).

        Raises:
            ConfigError: the source is no valid template.
        """
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        environment = _environment()
        try:
            self._variables = meta.find_undeclared_variables(environment.parse(source))
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"chat template, line {error.lineno}: {error.message}; correct it (Jinja, as transformers reads it)"
            ) from error
        self._reserved = {"messages", "tools", "add_generation_prompt", *self._special_tokens, *environment.globals}

    @property
    def handles_tools(self) -> bool:
        """Whether the template tells the model of tools."""
        return "tools" in self._variables

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]] | None = None,
        *,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, object] | None = None,
    ) -> str:
        """Return the prompt text, special tokens such as bos included.

        Args:
            messages: plain data, as parsed from JSON.
            tools: JSON schemas of the functions that the model may call.
            add_generation_prompt: end with what opens the assistant's turn.
            template_kwargs: further variables, as the client gave them (enable_thinking, documents, ...).

        Raises:
            InvalidRequest: the template refuses these messages or fails on them, or template_kwargs names a variable
                that is not the client's to set.
        """
        variables = {"documents": None, **self._checked(template_kwargs or {}), **self._special_tokens}
        try:
            return self._template.render(
                variables, messages=messages, tools=tools, add_generation_prompt=add_generation_prompt
            )
        except _RENDER_ERRORS as error:
            raise InvalidRequest(f"the chat template refuses these messages: {error}", param="messages") from error

    def _checked(self, template_kwargs: Mapping[str, object]) -> Mapping[str, object]:
        if taken := sorted(self._reserved.intersection(template_kwargs)):
            raise InvalidRequest(
                f"chat_template_kwargs sets {', '.join(taken)}: reserved for the server, leave it out",
                param="chat_template_kwargs",
            )
        return template_kwargs


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's text for training; here it is its content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _TemplateNamespace(Namespace):
    """Jinja's namespace without underscore names, with which a template could dress up as another object."""

    def __init__(*args: object, **kwargs: object) -> None:  # so that a template may set a variable named self
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_public(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: object) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _environment() -> Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _TemplateNamespace
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which would put \u003c into prompts.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _check_public(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"a namespace of a chat template cannot hold {name!r}: rename it, without underscore")
