"""Tools of a response request, which have the fields of a function beside their type."""

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, WrapValidator

from ..shared.api_model import ApiModel
from ..shared.tools import (
    AllowedChoice,
    AllowedTools,
    ChoiceMode,
    FunctionDefinition,
    FunctionName,
    FunctionTool,
    NamedChoice,
    NamedFunction,
    OtherTool,
    choice_parser,
    skip_other_tools,
)


class ResponseTool(FunctionDefinition):
    """A tool of type function, the only type served."""

    path_prefix: ClassVar[str] = "tools."

    type: Literal["function"]

    def to_chat(self) -> FunctionTool:
        """The tool in the words of chat completions."""
        definition = FunctionDefinition(
            name=self.name, description=self.description, parameters=self.parameters, strict=self.strict
        )
        return FunctionTool(type="function", function=definition)


ResponseTools = Annotated[
    list[ResponseTool], BeforeValidator(skip_other_tools, json_schema_input_type=list[ResponseTool | OtherTool])
]


class ResponseNamedChoice(ApiModel):
    """One of the tools offered."""

    path_prefix: ClassVar[str] = "tool_choice."

    type: Literal["function"]
    name: FunctionName

    def to_chat(self) -> NamedChoice:
        """The choice in the words of chat completions."""
        return NamedChoice(type="function", function=NamedFunction(name=self.name))


class ResponseAllowedChoice(ApiModel):
    """Some of the tools offered; with mode "required" one has to be called."""

    path_prefix: ClassVar[str] = "tool_choice."

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[
        list[ResponseNamedChoice],
        Field(min_length=1),
        BeforeValidator(skip_other_tools, json_schema_input_type=list[ResponseNamedChoice | OtherTool]),
    ]

    def to_chat(self) -> AllowedChoice:
        """The choice in the words of chat completions."""
        allowed = AllowedTools(mode=self.mode, tools=[tool.to_chat() for tool in self.tools])
        return AllowedChoice(type="allowed_tools", allowed_tools=allowed)


ResponseToolChoice = Annotated[
    ChoiceMode | ResponseNamedChoice | ResponseAllowedChoice,
    WrapValidator(choice_parser({"function": ResponseNamedChoice, "allowed_tools": ResponseAllowedChoice})),
]
