"""The items of an input: messages, reasoning, calls and their results, in the forms in which clients send them."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema, WrapValidator

from cllm_core.errors import InvalidRequest

from ...http.ignored import ignore_field
from ..shared.api_model import ANY_VALUE, ApiModel, Neutral
from ..shared.calls import Arguments
from ..shared.content import Content
from ..shared.tools import parse_by_type

# What output items carry when clients send them back.
_LABELS: Mapping[str, Neutral] = dict.fromkeys(("status", "phase", "async", "async_", "namespace", "caller"), ANY_VALUE)

_PREFIX = "input."

HOSTED_ITEMS = frozenset({
    "additional_tools", "apply_patch_call", "apply_patch_call_output", "code_interpreter_call", "compaction",
    "compaction_trigger", "computer_call", "computer_call_output", "custom_tool_call", "custom_tool_call_output",
    "file_search_call", "image_generation_call", "local_shell_call", "local_shell_call_output", "mcp_approval_request",
    "mcp_approval_response", "mcp_call", "mcp_list_tools", "program", "program_output", "shell_call",
    "shell_call_output", "tool_search_call", "tool_search_output", "web_search_call",
})  # fmt: skip
"""Types of items that tell of tools which this server does not have."""


class _Item(ApiModel):
    """What all items have.

    Attributes:
        id: under which an answer or an earlier request had it.
    """

    path_prefix: ClassVar[str] = _PREFIX
    without_effect: ClassVar[Mapping[str, Neutral]] = _LABELS

    id: str | None = None


class InputMessage(_Item):
    """One message of the conversation so far."""

    keeps_empty: ClassVar[frozenset[str]] = frozenset({"content"})

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class InputCall(_Item):
    """A call that an earlier answer made."""

    type: Literal["function_call"]
    call_id: Annotated[str, Field(min_length=1)]
    name: str
    arguments: Arguments


class InputResult(_Item):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: str
    output: Content = ""


class ReasoningPart(ApiModel):
    """Some of what was thought."""

    path_prefix: ClassVar[str] = _PREFIX

    type: Literal["reasoning_text", "summary_text", "text"]
    text: str


class InputReasoning(_Item):
    """What an earlier answer thought; other servers' encrypted_content cannot be read here."""

    type: Literal["reasoning"]
    summary: list[ReasoningPart] | None = None
    content: list[ReasoningPart] | None = None

    @property
    def text(self) -> str:
        """The thoughts themselves where they are there, else their summary."""
        return "\n".join(part.text for part in self.content or self.summary or ())


class ItemReference(ApiModel):
    """Stands for a stored item."""

    path_prefix: ClassVar[str] = _PREFIX

    type: Literal["item_reference"] = "item_reference"
    id: Annotated[str, Field(min_length=1)]


ReadableItem = InputMessage | InputCall | InputResult | InputReasoning
InputItem = ReadableItem | ItemReference

_ITEM_FORMS: Mapping[str, type[ApiModel]] = {
    "message": InputMessage,
    "function_call": InputCall,
    "function_call_output": InputResult,
    "reasoning": InputReasoning,
    "item_reference": ItemReference,
}


class OtherItem(BaseModel):
    """An item of another type, which is ignored; for the OpenAPI document."""

    type: Annotated[str, WithJsonSchema({"type": "string", "not": {"enum": list(_ITEM_FORMS)}})]


def _type_of(item: object) -> object:
    """The item's type, which two forms may leave out."""
    if not isinstance(item, dict):
        raise InvalidRequest(f"input: an item must be an object, not {item!r:.80}", param="input")
    if item.get("type") is not None:
        return item["type"]
    return "item_reference" if "id" in item and item.keys() <= {"id", "type"} else "message"


def _parse_item(item: object, _: object) -> object:
    if isinstance(item, ApiModel):
        return item
    kind = _type_of(item)
    assert isinstance(item, dict)
    parsed = parse_by_type(_ITEM_FORMS, {**item, "type": kind})
    if parsed is None:
        raise InvalidRequest(f"input: an item's type must be a string, not {kind!r:.80}", param="input")
    return parsed


def _is_other_item(item: object) -> bool:
    kind = _type_of(item)
    if not isinstance(kind, str) or kind in _ITEM_FORMS:
        return False
    ignore_field(
        kind,
        prefix=_PREFIX,
        is_known=kind in HOSTED_ITEMS,
        reason=f"items of type {kind!r} cannot be read by this server",
    )
    return True


def _read_items(value: object) -> object:
    """A text as the message that it is; of a list the items that can be read, the others are reported."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise InvalidRequest("input: must be a string or a list of items, not empty", param="input")
    return [item for item in value if not _is_other_item(item)]


Input = Annotated[
    list[Annotated[InputItem, WrapValidator(_parse_item)]],
    BeforeValidator(
        _read_items, json_schema_input_type=str | Annotated[list[InputItem | OtherItem], Field(min_length=1)]
    ),
]
