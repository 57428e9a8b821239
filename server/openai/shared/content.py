"""Content of messages: a text, or parts whose texts are joined by line breaks; what is not text is refused."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator

from cllm_core.errors import InvalidRequest, UnsupportedParameter

from ...http.ignored import ignore_field
from .api_model import is_empty

# By type of part: the field that holds its text. The types of chat completions, of responses, and refusals.
_TEXT_FIELDS: Mapping[str, str] = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
}
# What models thought before an earlier answer; not part of what they said.
_THOUGHTS = frozenset({"thinking", "redacted_thinking", "reasoning"})
# Of parts of answers, which clients send back.
_ANSWER_FIELDS = frozenset({"annotations", "logprobs", "parsed"})


class TextPart(BaseModel):
    """A content part that is text, for the OpenAPI document."""

    type: Literal["text", "input_text", "output_text"]
    text: str


class RefusalPart(BaseModel):
    """A content part of an answer that refused, for the OpenAPI document."""

    type: Literal["refusal"]
    refusal: str


def _as_text(content: object) -> object:
    if isinstance(content, list):
        return "\n".join(filter(None, map(_text_of_part, content)))
    if content is not None and not isinstance(content, str):
        raise InvalidRequest(f"content={content!r:.80}: must be a string or a list of content parts")
    return content


def _text_of_part(part: object) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str):
        raise InvalidRequest(f"content: a part must be an object with a type such as 'text', not {part!r:.80}")
    if kind in _THOUGHTS:
        ignore_field(kind, prefix="messages.content.", reason="thoughts before an earlier answer are not read")
        return ""
    if kind not in _TEXT_FIELDS:
        raise UnsupportedParameter(
            f"content: a part of type {kind!r} cannot be read, this server takes text only; remove it or send its text"
        )
    return _field_of_text_part(part, kind)


def _field_of_text_part(part: Mapping[str, object], kind: str) -> str:
    name = _TEXT_FIELDS[kind]
    text = part.get(name)
    if not isinstance(text, str):
        raise InvalidRequest(f"content: a part of type {kind!r} needs {name!r}, a string; {text!r:.80} is not one")
    for other in part.keys() - {"type", name} - _ANSWER_FIELDS:
        if not is_empty(part[other]):
            ignore_field(other, prefix="messages.content.", is_known=other == "cache_control")
    return text


Content = Annotated[str, BeforeValidator(_as_text, json_schema_input_type=str | list[TextPart | RefusalPart])]
