"""Calls of functions in earlier answers, as clients send them back."""

import json
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, JsonValue

from cllm_core.text.tools.conversation import MadeCall
from cllm_core.text.tools.functions import FunctionCall

from .api_model import ANY_VALUE, ApiModel, Neutral


def _as_text(arguments: object) -> object:
    """Arguments that some clients send as the object they are."""
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments


Arguments = Annotated[str, BeforeValidator(_as_text, json_schema_input_type=str | dict[str, JsonValue])]
"""The text of a JSON object, incomplete where the answer was cut before its end."""


class CalledFunction(ApiModel):
    """A function that was called."""

    path_prefix: ClassVar[str] = "messages.tool_calls.function."
    without_effect: ClassVar[Mapping[str, Neutral]] = {"parsed_arguments": ANY_VALUE}

    name: str
    arguments: Arguments = ""


class MessageToolCall(ApiModel):
    """A call in an earlier answer; without an id no result can refer to it."""

    path_prefix: ClassVar[str] = "messages.tool_calls."
    without_effect: ClassVar[Mapping[str, Neutral]] = {"index": ANY_VALUE}

    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction

    def to_made_call(self) -> MadeCall:
        """The call as the text layer knows it."""
        return MadeCall(self.id, FunctionCall(self.function.name, self.function.arguments or "{}"))
