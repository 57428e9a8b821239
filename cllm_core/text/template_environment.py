"""The Jinja dialect of chat templates: that of transformers, in Jinja's sandbox, with the provenance of text kept.

Templates come with the checkpoint, hence from strangers: they run in the sandbox and see plain data only. What they
concatenate, cut or print stays a TracedText. What is made of it in any other way (tojson, upper, printing a list) is
wholly the client's where some of it is.
"""

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from itertools import count
from types import BuiltinMethodType
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes, pass_eval_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.filters import make_attrgetter
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from cllm_core.text.provenance import TracedText, concat, from_template, holds_client_text, of_any

# Filters that return one of their arguments, or whose work on texts a TracedText keeps track of.
_FOLLOWED_FILTERS = frozenset(
    {
        *("attr", "d", "default", "first", "last", "max", "min", "random"),
        *("format", "join", "replace", "reverse", "string", "trim"),
    }
)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Compiles chat templates. What they render is a TracedText."""

    concat = staticmethod(concat)  # of all that a template, a macro or a block prints
    intercepted_binops = frozenset({"*", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
            finalize=_as_text,
        )
        filters = {**self.filters, "tojson": _to_json, "join": _join}
        self.filters = {
            name: _traced(function, keeps_track=name in _FOLLOWED_FILTERS) for name, function in filters.items()
        }
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _traced(_strftime_now)
        self.globals["namespace"] = _TemplateNamespace

    def template(self, tree: nodes.Template) -> Template:
        """The template of a syntax tree, which is changed."""
        _Concatenations().visit(tree)
        tree.set_environment(self)
        return self.from_string(tree)

    # What templates get at by names and operators goes through these.

    def getattr(self, obj: Any, attribute: str) -> Any:
        """As Jinja's; methods of texts keep track."""
        return _traced_method(super().getattr(_traced_value(obj), attribute))

    def getitem(self, obj: Any, argument: Any) -> Any:
        """As Jinja's; methods of texts keep track."""
        return _traced_method(super().getitem(_traced_value(obj), argument))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """As Jinja's, for texts too."""
        result = super().call_binop(context, operator, _traced_value(left), right)
        return of_any(result, left, right) if type(result) is str else result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """A replacement for the methods format and format_map of a text, None for any other value."""
        if super().wrap_str_format(value) is None:
            return None
        form, is_map = value.__self__, value.__name__ == "format_map"

        def fill(*args: Any, **kwargs: Any) -> str:
            formatter = _TracingFormatter(self)
            return formatter.fill(form, (), args[0]) if is_map else formatter.fill(form, args, kwargs)

        return fill


class _TracingFormatter(SandboxedFormatter):
    def fill(self, form: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        """`form.format(*args, **kwargs)`, each field with the provenance of its value."""
        filled = self.vformat(form, args, kwargs)
        followed = concat(self._pieces(form, args, kwargs))
        if followed == filled and not holds_client_text(form):
            return followed
        return of_any(filled, form, list(args), kwargs)

    def _pieces(self, form: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterable[str]:
        numbers = count()
        for literal, name, spec, conversion in self.parse(form):
            yield literal
            if name is not None:
                numbered = f"{next(numbers)}{name}" if name[:1] in ("", ".", "[") else name
                value, _ = self.get_field(numbered, args, kwargs)
                text = self.format_field(self.convert_field(value, conversion), self.vformat(spec or "", args, kwargs))
                yield value if isinstance(value, TracedText) and value == text else of_any(text, value)


class _Concatenations(NodeTransformer):
    """Writes `a ~ b` as `[a, b] | join`: the code that Jinja makes for the operator joins plain texts."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802 - the visitor goes by names of nodes
        self.generic_visit(node)
        return nodes.Filter(nodes.List(node.nodes), "join", [], [], None, None).set_lineno(node.lineno)


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


def _traced_value(value: Any) -> Any:
    return from_template(value) if type(value) is str else value


def _traced(function: Callable[..., Any], *, keeps_track: bool = False) -> Callable[..., Any]:
    """The function; a text that it returns belongs to whom its arguments do, unless the function itself keeps track."""
    num_passed = 1 if hasattr(function, "jinja_pass_arg") else 0  # arguments from Jinja: the context, the environment

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*map(_traced_value, args), **kwargs)
        if not isinstance(result, str) or (keeps_track and isinstance(result, TracedText)):
            return result
        return of_any(result, list(args[num_passed:]), kwargs)

    return call


def _traced_method(method: Any) -> Any:
    """The method; a plain str that a text's method returns belongs to whom the text and the arguments do."""
    if not (isinstance(method, BuiltinMethodType) and isinstance(method.__self__, str | bytes)):
        return method

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        return of_any(result, method.__self__, list(args), kwargs) if type(result) is str else result

    return call


def _as_text(value: Any) -> str:
    if type(value) is str or isinstance(value, TracedText):
        return value
    return of_any(str(value), value)


@pass_eval_context
def _join(eval_context: EvalContext, value: Iterable[Any], d: Any = "", attribute: str | int | None = None) -> str:
    if attribute is not None:
        value = map(make_attrgetter(eval_context.environment, attribute), value)
    return from_template(_as_text(d)).join(map(_as_text, value))


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
