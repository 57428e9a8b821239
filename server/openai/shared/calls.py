"""Calls of functions in earlier answers, as clients send them back, and their results."""

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from cllm_core.errors import InvalidRequest
from cllm_core.text.tools.conversation import MadeCall
from cllm_core.text.tools.functions import FunctionCall, parse_arguments
from server.openai.shared.api_model import ApiModel, IsNeutral, client_side, without_neutral
from server.openai.shared.tools import FunctionName


def _check_arguments(text: str) -> str:
    try:
        parse_arguments(text)
    except ValueError as error:
        raise ValueError(f"must be the text of a JSON object, as it came in the call ({error})") from error
    return text


Arguments = Annotated[str, AfterValidator(_check_arguments)]


class _SentBack(ApiModel):
    """Part of an answer that clients send back."""

    @model_validator(mode="before")
    @classmethod
    def _drop_client_side(cls, part: object) -> object:
        return without_neutral(part, cls.refusable)


class CalledFunction(_SentBack):
    """A function that was called."""

    refusable: ClassVar[Mapping[str, IsNeutral]] = {"parsed_arguments": client_side}

    name: FunctionName
    arguments: Arguments


class MessageToolCall(_SentBack):
    """A call in an earlier answer."""

    refusable: ClassVar[Mapping[str, IsNeutral]] = {"index": client_side}

    id: Annotated[str, Field(min_length=1)]
    type: Literal["function"]
    function: CalledFunction

    def to_made_call(self) -> MadeCall:
        """The call as the text layer knows it."""
        return MadeCall(self.id, FunctionCall(self.function.name, self.function.arguments or "{}"))


def check_results(steps: Iterable[tuple[Iterable[str], str | None]], place: Callable[[int], str]) -> None:
    """Raise InvalidRequest where the result of a call stands before the call or without it.

    Args:
        steps: of a conversation; for each the ids of the calls that it makes, and of the call that it is the result of.
        place: the field that holds the latter, by the number of the step.
    """
    known: set[str] = set()
    for index, (made, answered) in enumerate(steps):
        if answered is not None and answered not in known:
            field = place(index)
            raise InvalidRequest(
                f"{field}={answered!r}: no call before it has this id; send the message with the call too", param=field
            )
        known.update(made)
