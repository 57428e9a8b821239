"""Function tools in request bodies: the fields that offer them and choose among them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, WrapValidator

from cllm_core.errors import InvalidRequest, UnsupportedParameter
from cllm_core.text.expected_answer import ExpectedAnswer, OutputSyntax
from cllm_core.text.tools.functions import NAME_PATTERN, Function
from cllm_core.text.tools.grammar import CallRules
from server.openai.shared.api_model import ApiModel

FunctionName = Annotated[str, Field(pattern=f"^{NAME_PATTERN}$")]


def _check_object_schema(schema: dict[str, JsonValue]) -> dict[str, JsonValue]:
    if schema.get("type", "object") != "object":
        raise ValueError("must be the JSON schema of an object: give it the type 'object'")
    return schema


ObjectSchema = Annotated[dict[str, JsonValue], AfterValidator(_check_object_schema)]


class FunctionDefinition(ApiModel):
    """A function that the model may call.

    Attributes:
        parameters: JSON schema of its arguments; left out, it has none.
        strict: refuse a schema that cannot be enforced whole. Calls match the schema in either case.
    """

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

    type: Literal["function"]
    function: FunctionDefinition


def refuse_other_tools(tools: object) -> object:
    """Name the tool of a type that is not served, before its other fields are looked at."""
    for index, tool in enumerate(tools if isinstance(tools, list) else ()):
        kind = tool.get("type") if isinstance(tool, dict) else None
        if isinstance(kind, str) and kind != "function":
            raise UnsupportedParameter(
                f"tools.{index}.type={kind!r}: only tools of type 'function' are supported", param=f"tools.{index}.type"
            )
    return tools


Tools = Annotated[list[FunctionTool], BeforeValidator(refuse_other_tools)]


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
    """The value as the form that its `type` names, None where that names none; errors tell their place in the value."""
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
                "tool_choice: must be 'none', 'auto', 'required', or an object of type 'function' or 'allowed_tools'",
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
        functions: all that the model is told of.
        rules: which of them it may or must call.
    """

    functions: tuple[Function, ...]
    rules: CallRules

    def syntax(self, expected: ExpectedAnswer) -> OutputSyntax | None:
        """How the calls are read in an answer."""
        return expected.syntax(self.rules.functions, is_required=self.rules.is_required)


def tool_use(
    tools: Sequence[FunctionTool] | None, choice: ChoiceMode | NamedChoice | AllowedChoice | None, *, is_parallel: bool
) -> ToolUse | None:
    """What the fields of a request ask for, None where it asks for no calls.

    Raises:
        InvalidRequest: a name is given twice, or the choice names a function that is not offered.
    """
    functions = tuple(tool.function.to_function() for tool in tools or ())
    _check_names([function.name for function in functions])
    mode, chosen = _read_choice(choice)
    if chosen is None:
        chosen = [function.name for function in functions]
    if mode == "required" and not functions:
        raise InvalidRequest("tool_choice: wants a call, but there are no tools: give some", param="tool_choice")
    _check_chosen(chosen, functions)
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


def _check_names(names: Sequence[str]) -> None:
    for index, name in enumerate(names):
        if name in names[:index]:
            raise InvalidRequest(
                f"tools.{index}: a second function named {name!r}; give each a name of its own", param="tools"
            )


def _check_chosen(chosen: Sequence[str], functions: Sequence[Function]) -> None:
    offered = [function.name for function in functions]
    for name in chosen:
        if name not in offered:
            raise InvalidRequest(
                f"tool_choice: no tool is named {name!r}; the tools are {offered}", param="tool_choice"
            )
