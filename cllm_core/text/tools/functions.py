"""Functions that a client offers to a model, and calls of them."""

from collections.abc import Mapping

import msgspec

from cllm_core.text.json_text import parse_object

NAME_PATTERN = r"[A-Za-z0-9_-]{1,64}"
"""Of functions, as OpenAI documents it."""


class Function(msgspec.Struct, frozen=True, kw_only=True):
    """A function that the client offers.

    Attributes:
        parameters: JSON schema of the object that holds its arguments; None where it has none.
        is_strict: the schema must be one that can be enforced whole, else what cannot be is left to the model.
    """

    name: str
    description: str | None = None
    parameters: Mapping[str, object] | None = None
    is_strict: bool = False

    def as_tool(self) -> dict[str, object]:
        """The function in OpenAI's words, which chat templates expect; many count on parameters."""
        description = {} if self.description is None else {"description": self.description}
        parameters = self.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": {"name": self.name, **description, "parameters": parameters}}

    def arguments_schema(self) -> dict[str, object]:
        """JSON schema of a call's arguments: an object, of the parameters that the function declares and no others."""
        schema: dict[str, object] = {"properties": {}} if self.parameters is None else dict(self.parameters)
        schema["type"] = "object"
        if "properties" in schema:
            schema.setdefault("additionalProperties", False)
        # What the library cannot enforce is refused where the client is strict about it, else left to the model.
        return schema | {"x-guidance": {"lenient": not self.is_strict}}


class FunctionCall(msgspec.Struct, frozen=True):
    """A call of a function; `arguments` is the text of a JSON object, incomplete where the output was cut."""

    name: str
    arguments: str


def parse_arguments(text: str) -> dict[str, object]:
    """The arguments of a call, none in an empty text; ValueError where the text is no JSON object."""
    return parse_object(text) if text else {}
