"""In which form a chat template takes the content of messages: as a text, as a list of parts, or as either.

Templates of models that read images walk over parts ({% for part in message.content %}{{ part.text }}) and some lose a
content that is a plain text. What a template does is found by rendering small conversations with it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Message = Mapping[str, object]
"""One message of a conversation, as parsed from JSON."""

_ROLES = ("user", "assistant", "system", "tool")

_PROBE = "What was said."
_USER: Message = {"role": "user", "content": "Hi"}
_CALL = {"id": "000000000", "type": "function", "function": {"name": "look", "arguments": {}}}
# What many templates want to stand before and behind a message of a role.
_BEFORE = {"assistant": (_USER,), "tool": (_USER, {"role": "assistant", "content": "", "tool_calls": [_CALL]})}
_BEHIND = {"assistant": (_USER,), "system": (_USER,)}


@dataclass(frozen=True, slots=True)
class ContentForms:
    """The forms that a template takes, by role.

    Attributes:
        text: roles whose content may be a text.
        parts: roles whose content may be a list of parts.
    """

    text: frozenset[str] = frozenset(_ROLES)
    parts: frozenset[str] = frozenset()

    def fit(self, message: Message) -> Message:
        """The message, its content in a form that the template takes: parts are joined by line breaks."""
        content, role = message.get("content"), message.get("role")
        if isinstance(content, str) and role in self.parts - self.text:
            return {**message, "content": _part_list(content)}
        if isinstance(content, list) and role not in self.parts:
            texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
            if all(isinstance(text, str) for text in texts):
                return {**message, "content": "\n".join(map(str, texts))}
        return message


def find_content_forms(render: Callable[[Sequence[Message]], str | None]) -> ContentForms:
    """The forms that a template takes.

    Args:
        render: the prompt of a conversation, None where the template refuses it.
    """
    forms = ContentForms()
    for role in _ROLES:
        if _shows(_part_list(_PROBE), role, forms, render):
            shows_text = _shows(_PROBE, role, forms, render)
            forms = ContentForms(forms.text if shows_text else forms.text - {role}, forms.parts | {role})
    return forms


def _shows(content: object, role: str, forms: ContentForms, render: Callable[[Sequence[Message]], str | None]) -> bool:
    """Whether the prompt holds what a message of this role says, by itself and not as a list printed whole."""
    probe: Message = {"role": role, "content": content}
    prompt = render([*map(forms.fit, _BEFORE.get(role, ())), probe, *map(forms.fit, _BEHIND.get(role, ()))])
    printed = (str(_part_list(_PROBE)[0]), json.dumps(_part_list(_PROBE)[0]))
    return prompt is not None and _PROBE in prompt and not any(text in prompt for text in printed)


def _part_list(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]
