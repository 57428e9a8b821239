"""Bounds on the shape of a request body, checked before anything else looks at it.

Validation takes time per entry and per error: without these, some megabytes of empty messages or unknown fields would
hold up every stream for seconds.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cllm_core.errors import InvalidRequest

MAX_CONTAINERS = 65_536
"""Lists and objects in one body. Parsing costs a second for each million of them."""

# Possessive and content with no closing quote, so that it never looks at a byte twice.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)

# What the form of an output is described by, in all its spellings.
_GRAMMAR_FIELDS = (
    "response_format",
    "text",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)

# Lists of token ids are as long as the context, which is checked where the model is known.
_TOKEN_ID_FIELDS = frozenset({"prompt", "tokens"})


def check_containers(body: bytes) -> None:
    """Raise InvalidRequest where a JSON text, not parsed yet, holds more than MAX_CONTAINERS lists and objects."""
    if _count_brackets(body) <= MAX_CONTAINERS:
        return
    # Long prompts of program text get here: only brackets outside of strings open something.
    num_containers = _count_brackets(_STRING.sub(b"", body))
    if num_containers > MAX_CONTAINERS:
        raise InvalidRequest(
            f"the request body has {num_containers} lists and objects; this server allows {MAX_CONTAINERS}: send fewer"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyLimits:
    """Bounds of one request body.

    Attributes:
        max_items: entries of any one list or object; lists of token ids are free.
        max_depth: lists and objects within each other, the body included.
        max_stop_chars: of one stop string.
        max_template_kwargs_chars: of chat_template_kwargs, written as JSON.
        max_grammar_chars: of a field that describes the form of the output, written as JSON.
        max_tools: entries of tools.
        max_tools_chars: of tools together, written as JSON.
    """

    max_items: int
    max_depth: int
    max_stop_chars: int
    max_template_kwargs_chars: int
    max_grammar_chars: int
    max_tools: int
    max_tools_chars: int

    def check(self, body: object) -> None:
        """Raise InvalidRequest, naming the field, where a parsed JSON body exceeds a bound."""
        if not isinstance(body, dict):
            return
        self._check_size(body, None)
        for name, value in body.items():
            self._check_nested(name, value)
        self._check_stop(body.get("stop"))
        self._check_chars(body, "chat_template_kwargs", self.max_template_kwargs_chars)
        for name in _GRAMMAR_FIELDS:
            self._check_chars(body, name, self.max_grammar_chars)
        self._check_tools(body)

    def _check_nested(self, field: str, value: object) -> None:
        level, depth = list(_inner_containers([value])), 2
        while level:
            if depth > self.max_depth:
                raise InvalidRequest(
                    f"{field}: nested deeper than the {self.max_depth} levels that this server allows; flatten it",
                    param=field,
                )
            if field in _TOKEN_ID_FIELDS:
                level = [container for container in level if not _is_token_ids(container)]
            for container in level:
                self._check_size(container, field)
            level = [inner for container in level for inner in _inner_containers(container)]
            depth += 1

    def _check_size(self, container: object, field: str | None) -> None:
        if isinstance(container, dict | list) and len(container) > self.max_items:
            raise InvalidRequest(
                f"{field or 'the request body'}: a list or object has {len(container)} entries; this server allows "
                f"{self.max_items}: send fewer",
                param=field,
            )

    def _check_stop(self, stop: object) -> None:
        texts = stop if isinstance(stop, list) else [stop]
        longest = max((len(text) for text in texts if isinstance(text, str)), default=0)
        if longest > self.max_stop_chars:
            raise InvalidRequest(
                f"stop: a string has {longest} characters; this server allows {self.max_stop_chars}: shorten it",
                param="stop",
            )

    def _check_tools(self, body: Mapping[str, object]) -> None:
        tools = body.get("tools")
        if isinstance(tools, list) and len(tools) > self.max_tools:
            raise InvalidRequest(
                f"tools: {len(tools)} tools; this server allows {self.max_tools} a request: send fewer", param="tools"
            )
        self._check_chars(body, "tools", self.max_tools_chars)

    def _check_chars(self, body: Mapping[str, object], field: str, max_chars: int) -> None:
        if body.get(field) is None:
            return
        num_chars = len(json.dumps(body[field], ensure_ascii=False))
        if num_chars > max_chars:
            raise InvalidRequest(
                f"{field}: {num_chars} characters of JSON; this server allows {max_chars}: shorten it", param=field
            )


def _is_token_ids(value: object) -> bool:
    return isinstance(value, list) and set(map(type, value)) <= {int}


def _count_brackets(text: bytes) -> int:
    return text.count(b"[") + text.count(b"{")


def _inner_containers(value: object) -> Iterator[object]:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (item for item in items if isinstance(item, dict | list))
