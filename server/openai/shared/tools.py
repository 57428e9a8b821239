"""Function tools in request bodies: the fields that offer them and choose among them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, JsonValue, WithJsonSchema, WrapValidator

from cllm_core.errors import InvalidRequest, UnsupportedParameter
from cllm_core.text.expected_answer import ExpectedAnswer, OutputSyntax
from cllm_core.text.tools.functions import NAME_PATTERN, Function
from cllm_core.text.tools.grammar import CallRules

from ...http.ignored import ignore_field
from .api_model import ApiModel

FunctionName = Annotated[str, Field(pattern=f"^{NAME_PATTERN}$")]


def _check_object_schema(schema: dict[str, JsonValue]) -> dict[str, JsonValue]:
    if schema.get("type", "object") != "object":
        raise ValueError("must be the JSON schema of an object: set its type to 'object'")
    return schema


ObjectSchema = Annotated[dict[str, JsonValue], AfterValidator(_check_object_schema)]


class FunctionDefinition(ApiModel):
    """A function that the model may call.

    Attributes:
        parameters: JSON schema of its arguments; left out, it has none.
        strict: refuse a schema that cannot be enforced whole. Calls match the schema in either case.
    """

    path_prefix: ClassVar[str] = "tools.function."
    keeps_empty: ClassVar[frozenset[str]] = frozenset({"parameters"})  # of which {} takes any arguments

    name: FunctionName
    description: str | None = None
    parameters: ObjectSchema | None = None
    strict: bool | None = None

    def to_function(self) -> Function:
        """The function as the text layer knows it."""
        return Function(
            name=self.name,
            description=self.description,
            parameters=self.parameters,
            is_strict=bool(self.strict),
        )


class FunctionTool(ApiModel):
    """A tool of type function, the only type served."""

    path_prefix: ClassVar[str] = "tools."

    type: Literal["function"] = "function"
    function: FunctionDefinition


class OtherTool(BaseModel):
    """A tool of another type, which is ignored; for the OpenAPI document."""

    type: Annotated[str, WithJsonSchema({"type": "string", "not": {"const": "function"}})]


def skip_other_tools(tools: object) -> object:
    """The tools of type function; the others are not offered to the model, which is reported."""
    if not isinstance(tools, list):
        return tools
    return [tool for tool in tools if not _is_other_tool(tool)]


def _is_other_tool(tool: object) -> bool:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if not isinstance(kind, str) or kind == "function":
        return False
    ignore_field(kind, prefix="tools.", is_known=False, reason=f"tools of type {kind!r} are not supported")
    return True


Tools = Annotated[
    list[FunctionTool], BeforeValidator(skip_other_tools, json_schema_input_type=list[FunctionTool | OtherTool])
]


class NamedFunction(ApiModel):
    """The name of one of the functions offered."""

    name: FunctionName


class NamedChoice(ApiModel):
    """One of the tools offered."""

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(ApiModel):
    """Some of the tools offered; with mode "required" one has to be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedChoice], Field(min_length=1)]


class AllowedChoice(ApiModel):
    """The choice of some tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ChoiceMode = Literal["none", "auto", "required"]


def parse_by_type(forms: Mapping[str, type[ApiModel]], value: object) -> ApiModel | None:
    """The value as the form that its `type` names, None where that names none; errors name their path in the value."""
    kind = value.get("type") if isinstance(value, dict) else None
    form = forms.get(kind) if isinstance(kind, str) else None
    return None if form is None else form.model_validate(value)


def choice_parser(forms: Mapping[str, type[ApiModel]]) -> Callable[[object, object], object]:
    """A validator for a tool_choice that is a word or one of these objects, told apart by their type."""

    def parse(value: object, _: object) -> object:
        if value in get_args(ChoiceMode) or isinstance(value, tuple(forms.values())):
            return value
        choice = parse_by_type(forms, value)
        if choice is None:
            raise UnsupportedParameter(
                f"tool_choice={value!r:.80}: must be 'none', 'auto', 'required', or an object of type 'function' or "
                "'allowed_tools'",
                param="tool_choice",
            )
        return choice

    return parse


ToolChoice = Annotated[
    ChoiceMode | NamedChoice | AllowedChoice,
    WrapValidator(choice_parser({"function": NamedChoice, "allowed_tools": AllowedChoice})),
]


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What tools a request offers, and which calls it wants.

    Attributes:
        functions: all that are described to the model.
        rules: which of them it may or must call.
    """

    functions: tuple[Function, ...]
    rules: CallRules

    def syntax(self, expected: ExpectedAnswer) -> OutputSyntax | None:
        """How the calls are read in an answer."""
        return expected.syntax(self.rules.functions, is_required=self.rules.is_required)


def tool_use(
    tools: Sequence[FunctionTool] | None,
    choice: ChoiceMode | NamedChoice | AllowedChoice | None,
    *,
    is_parallel: bool,
    tools_field: str = "tools",
    choice_field: str = "tool_choice",
) -> ToolUse | None:
    """What the fields of a request ask for, None where it asks for no calls.

    Raises:
        InvalidRequest: a name is given twice, or the choice names a function that is not offered.
    """
    functions = tuple(tool.function.to_function() for tool in tools or ())
    _check_names([function.name for function in functions], field=tools_field)
    mode, chosen = _read_choice(choice)
    if chosen is None:
        chosen = [function.name for function in functions]
    if mode == "required" and not functions:
        raise InvalidRequest(
            f"{choice_field}: demands a call, but no tools of type 'function' were provided; add one or leave "
            f"{choice_field} out",
            param=choice_field,
        )
    _check_chosen(chosen, functions, field=choice_field)
    if mode == "none" or not functions:
        return None
    rules = CallRules(
        functions=tuple(function for function in functions if function.name in chosen),
        is_required=mode == "required",
        # Whoever names the function to call wants one call; small models would go on for ever.
        is_parallel=is_parallel and not isinstance(choice, NamedChoice),
    )
    return ToolUse(functions, rules)


def _read_choice(choice: ChoiceMode | NamedChoice | AllowedChoice | None) -> tuple[ChoiceMode, list[str] | None]:
    """The mode, and the names of the functions it is about; None for all."""
    match choice:
        case NamedChoice():
            return "required", [choice.function.name]
        case AllowedChoice():
            return choice.allowed_tools.mode, [tool.function.name for tool in choice.allowed_tools.tools]
        case None:
            return "auto", None
        case _:
            return choice, None


def _check_names(names: Sequence[str], *, field: str) -> None:
    for index, name in enumerate(names):
        if name in names[:index]:
            raise InvalidRequest(
                f"{field}.{index}: a second function named {name!r}; give each a name of its own", param=field
            )


def _check_chosen(chosen: Sequence[str], functions: Sequence[Function], *, field: str) -> None:
    offered = [function.name for function in functions]
    for name in chosen:
        if name not in offered:
            raise InvalidRequest(f"{field}: no function is named {name!r}; name one of {offered}", param=field)
