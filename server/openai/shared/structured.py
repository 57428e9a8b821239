"""The form that a request demands of its output: OpenAI's response_format, and what open servers have beside it."""

import json
from collections.abc import Iterator
from functools import partial
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, JsonValue, model_validator

from cllm_core.errors import InvalidRequest
from cllm_core.text.grammar import choice_grammar, json_grammar, json_object_grammar, regex_grammar, written_grammar
from server.generation.grammar_checker import OutputForm
from server.openai.shared.api_model import ApiModel
from server.openai.shared.sampling import GenerationRequest

JsonSchema = dict[str, JsonValue]


class TextFormat(ApiModel):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(ApiModel):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(ApiModel):
    """A JSON schema under a name, which like the description changes nothing here; without a schema, any JSON object.

    Attributes:
        strict: the output matches the schema whatever this says.
    """

    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: JsonSchema | None = Field(default=None, alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(ApiModel):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StructuredOutputs(ApiModel):
    """One of the forms, in the words of vLLM.

    Attributes:
        json_: JSON schema, as an object or as its text.
        regex: that the whole output matches.
        choice: texts, one of which is the output.
        grammar: in Lark's syntax or in GBNF.
        json_object: true for any JSON object.
    """

    json_: JsonSchema | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class StructuredRequest(GenerationRequest):
    """A request that may demand a form of its output; the last group are extensions of open servers."""

    format_field: ClassVar[str] = "response_format"

    response_format: ResponseFormat | None = None

    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonSchema | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    @model_validator(mode="after")
    def _check_output_form(self) -> Self:
        self.output_form()
        return self

    def output_form(self) -> OutputForm | None:
        """The form, None where any text will do (InvalidRequest where several are demanded)."""
        forms = [*self._response_forms(), *self._structured_forms(), *self._guided_forms()]
        if len(forms) > 1:
            first, second = forms[:2]
            raise InvalidRequest(
                f"{second.param}: {first.param} demands a form of the output already; leave one of them out",
                param=second.param,
            )
        return forms[0] if forms else None

    def _response_forms(self) -> Iterator[OutputForm]:
        match self.response_format:
            case JsonObjectFormat():
                yield OutputForm(self.format_field, json_object_grammar, is_quick=True)
            case JsonSchemaFormat(json_schema=named):
                schema = named.schema_
                write = json_object_grammar if schema is None else partial(json_grammar, schema)
                yield OutputForm(self.format_field, write, is_quick=True)

    def _structured_forms(self) -> Iterator[OutputForm]:
        wanted = self.structured_outputs
        if wanted is None:
            return
        forms = list(_forms("structured_outputs.", wanted.json_, wanted.regex, wanted.choice, wanted.grammar))
        if wanted.json_object:
            forms.append(OutputForm("structured_outputs.json_object", json_object_grammar, is_quick=True))
        if not forms:
            raise InvalidRequest(
                "structured_outputs: give one of json, regex, choice, grammar and json_object",
                param="structured_outputs",
            )
        yield from forms

    def _guided_forms(self) -> Iterator[OutputForm]:
        return _forms("guided_", self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar)


def _forms(
    prefix: str, schema: JsonSchema | str | None, regex: str | None, choice: list[str] | None, grammar: str | None
) -> Iterator[OutputForm]:
    if schema is not None:
        yield OutputForm(f"{prefix}json", lambda: json_grammar(_parsed(schema)), is_quick=True)
    if regex is not None:
        yield OutputForm(f"{prefix}regex", lambda: regex_grammar(regex), is_quick=True)
    if choice is not None:
        yield OutputForm(f"{prefix}choice", lambda: choice_grammar(choice), is_quick=True)
    if grammar is not None:
        # Not quick: GBNF is converted step by step in Python.
        yield OutputForm(f"{prefix}grammar", lambda: written_grammar(grammar))


def _parsed(schema: JsonSchema | str) -> JsonSchema:
    if not isinstance(schema, str):
        return schema
    try:
        value = json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the text is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidRequest("the text of a JSON schema must be an object")
    return value
