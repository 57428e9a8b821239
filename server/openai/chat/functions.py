"""`functions` and `function_call`, deprecated by OpenAI: as `tools` and `tool_choice`, without parallel calls."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from ..shared.api_model import ApiModel
from ..shared.tools import (
    ChoiceMode,
    FunctionDefinition,
    FunctionName,
    FunctionTool,
    NamedChoice,
    NamedFunction,
    ToolUse,
    tool_use,
)


class NamedFunctionCall(ApiModel):
    """One of the functions offered."""

    path_prefix: ClassVar[str] = "function_call."

    name: FunctionName


Functions = list[FunctionDefinition]
FunctionCallChoice = Literal["none", "auto"] | NamedFunctionCall


def functions_use(functions: Sequence[FunctionDefinition] | None, choice: FunctionCallChoice | None) -> ToolUse | None:
    """As tool_use; these fields know no parallel calls."""
    tools = [FunctionTool(function=function) for function in functions or ()]
    if isinstance(choice, NamedFunctionCall):
        tool_choice: ChoiceMode | NamedChoice | None = NamedChoice(
            type="function", function=NamedFunction(name=choice.name)
        )
    else:
        tool_choice = choice
    return tool_use(tools, tool_choice, is_parallel=False, tools_field="functions", choice_field="function_call")
