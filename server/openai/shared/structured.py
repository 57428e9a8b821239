"""The form that a request demands of its output: OpenAI's response_format, and what open servers have beside it."""

import json
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, JsonValue, model_validator

from cllm_core.errors import InvalidRequest
from cllm_core.text.grammar import (
    choice_grammar,
    has_look_around,
    json_grammar,
    json_object_grammar,
    regex_grammar,
    written_grammar,
)

from ...generation.grammar_checker import OutputForm
from ...http.ignored import ignore_field
from .api_model import ApiModel
from .sampling import SamplingRequest

JsonSchema = dict[str, JsonValue]


class TextFormat(ApiModel):
    """Any text."""

    path_prefix: ClassVar[str] = "response_format."

    type: Literal["text"]


class JsonObjectFormat(ApiModel):
    """Any JSON object, or one of a schema where there is one (as llama-server has it)."""

    path_prefix: ClassVar[str] = "response_format."
    keeps_empty: ClassVar[frozenset[str]] = frozenset({"schema"})

    type: Literal["json_object"]
    schema_: JsonSchema | None = Field(default=None, alias="schema")


class NamedSchema(ApiModel):
    """A JSON schema under a name, which like the description changes nothing here; without a schema, any JSON object.

    Attributes:
        strict: refuse a schema that cannot be enforced whole; else what cannot be is left to the model and reported.
    """

    path_prefix: ClassVar[str] = "response_format.json_schema."
    keeps_empty: ClassVar[frozenset[str]] = frozenset({"schema"})  # of which {} takes any value

    name: str | None = None
    description: str | None = None
    schema_: JsonSchema | None = Field(default=None, alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(ApiModel):
    """JSON of a schema, which llama-server takes without a name around it too."""

    path_prefix: ClassVar[str] = "response_format."
    keeps_empty: ClassVar[frozenset[str]] = frozenset({"json_schema", "schema"})

    type: Literal["json_schema"]
    json_schema: NamedSchema | None = None
    schema_: JsonSchema | None = Field(default=None, alias="schema")

    @property
    def named(self) -> NamedSchema:
        """The schema in OpenAI's words."""
        return self.json_schema or NamedSchema(schema=self.schema_)


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

    path_prefix: ClassVar[str] = "structured_outputs."
    keeps_empty: ClassVar[frozenset[str]] = frozenset({"json"})

    json_: JsonSchema | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class StructuredRequest(SamplingRequest):
    """A request that may demand a form of its output; the last group are extensions of open servers.

    Attributes:
        grammar, json_schema: as llama-server calls guided_grammar and guided_json.
    """

    keeps_empty: ClassVar[frozenset[str]] = frozenset({"guided_json", "json_schema"})
    format_field: ClassVar[str] = "response_format"

    response_format: ResponseFormat | None = None

    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonSchema | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    json_schema: JsonSchema | str | None = None
    grammar: str | None = None

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
                f"{second.param}: {first.param} already sets the form of the output; leave one of them out",
                param=second.param,
            )
        return forms[0] if forms else None

    @property
    def wanted_format(self) -> ResponseFormat | None:
        """The form in OpenAI's words, None where none is demanded in them."""
        return self.response_format

    def _response_forms(self) -> Iterator[OutputForm]:
        match self.wanted_format:
            case JsonObjectFormat(schema_=schema):
                yield _json_form(self.format_field, schema, is_strict=False)
            case JsonSchemaFormat(named=named):
                yield _json_form(self.format_field, named.schema_, is_strict=bool(named.strict))

    def _structured_forms(self) -> Iterator[OutputForm]:
        wanted = self.structured_outputs
        if wanted is None:
            return
        forms = list(_forms("structured_outputs.", wanted.json_, wanted.regex, wanted.choice, wanted.grammar))
        if wanted.json_object:
            forms.append(OutputForm("structured_outputs.json_object", json_object_grammar, is_quick=True))
        if not forms:
            raise InvalidRequest(
                "structured_outputs: names no form; set one of json, regex, choice, grammar and json_object",
                param="structured_outputs",
            )
        yield from forms

    def _guided_forms(self) -> Iterator[OutputForm]:
        yield from _forms("guided_", self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar)
        if self.json_schema is not None:
            yield _json_form("json_schema", self.json_schema, is_strict=False)
        if self.grammar is not None:
            yield _grammar_form("grammar", self.grammar)


def _json_form(param: str, schema: JsonSchema | str | None, *, is_strict: bool) -> OutputForm:
    if schema is None:
        return OutputForm(param, json_object_grammar, is_quick=True)

    def write() -> str:
        parsed = _parsed(schema)
        if not is_strict and has_look_around(parsed):
            ignore_field("pattern", prefix=f"{param}.", reason="look-around in patterns cannot be enforced")
        return json_grammar(parsed, is_strict=is_strict)

    return OutputForm(param, write, is_quick=True)


def _grammar_form(param: str, grammar: str) -> OutputForm:
    # Not quick: GBNF is converted step by step in Python.
    return OutputForm(param, lambda: written_grammar(grammar))


def _forms(
    prefix: str, schema: JsonSchema | str | None, regex: str | None, choice: list[str] | None, grammar: str | None
) -> Iterator[OutputForm]:
    if schema is not None:
        yield _json_form(f"{prefix}json", schema, is_strict=False)
    if regex is not None:
        yield OutputForm(f"{prefix}regex", lambda: regex_grammar(regex), is_quick=True)
    if choice is not None:
        yield OutputForm(f"{prefix}choice", lambda: choice_grammar(choice), is_quick=True)
    if grammar is not None:
        yield _grammar_form(f"{prefix}grammar", grammar)


def _parsed(schema: JsonSchema | str) -> JsonSchema:
    if not isinstance(schema, str):
        return schema
    try:
        value = json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the text is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidRequest("the text of a JSON schema must be an object")
    return value
