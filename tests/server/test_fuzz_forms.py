"""Whatever schema, pattern, grammar or tool a request brings: it is served or refused by name, at once."""

import json
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server.fakes import MODEL_NAME
from tests.server.harness import RunningServer

MAX_SECONDS = 1.0  # of the processor, server and client together

PATTERNS = st.sampled_from(["^a+$", "(a+)+$", "(?=a)b", "[", "\\p{L}{1,9}", "a{2000000000}", "(?i)x", "\\1", "", "é*"])
SCALARS = st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False) | st.text(max_size=4)
COUNTS = st.integers(-1, 3) | st.just(10**18) | st.just("many")


def with_keywords(schemas: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    """Schemas around schemas: keywords that fit together or do not, with values of the right type or not."""
    return st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(
                ["object", "array", "string", "integer", "number", "boolean", "null", "x", ["null"]]
            ),
            "properties": st.dictionaries(st.sampled_from(["a", "b", "\ud800"]), schemas, max_size=2),
            "required": st.lists(st.sampled_from(["a", "c"]), max_size=2),
            "additionalProperties": schemas | st.booleans(),
            "items": schemas,
            "anyOf": st.lists(schemas, max_size=2),
            "allOf": st.lists(schemas, max_size=2),
            "not": schemas,
            "enum": st.lists(SCALARS, max_size=3),
            "const": SCALARS,
            "pattern": PATTERNS,
            "format": st.sampled_from(["date-time", "nonsense"]),
            "minLength": COUNTS,
            "maxItems": COUNTS,
            "minimum": st.floats(allow_nan=False),
            "$ref": st.sampled_from(["#", "#/$defs/a", "#/properties/a", "http://127.0.0.1:9/schema", 5]),
            "$defs": st.dictionaries(st.sampled_from(["a"]), schemas, max_size=1),
        },
    )


SCHEMAS = st.recursive(st.booleans() | SCALARS | st.just({}), with_keywords, max_leaves=5)
TEXTS = PATTERNS | st.text(max_size=20) | st.sampled_from(["start: start", 'root ::= "a"', "start: /a/ start?", "%"])
NAMES = st.sampled_from(["f", "g", "a b", "", "x" * 65])
TOOLS = st.builds(
    lambda name, schema, strict: [
        {"type": "function", "function": {"name": name, "parameters": schema, "strict": strict}}
    ],
    NAMES,
    SCHEMAS,
    st.booleans(),
)
FORMS: dict[str, st.SearchStrategy[dict[str, object]]] = {
    "response_format": st.fixed_dictionaries(
        {
            "response_format": st.builds(
                lambda name, schema: {"type": "json_schema", "json_schema": {"name": name, "schema": schema}},
                NAMES,
                SCHEMAS,
            )
        }
    ),
    "guided_json": st.fixed_dictionaries({"guided_json": SCHEMAS}),
    "guided_regex": st.fixed_dictionaries({"guided_regex": TEXTS}),
    "guided_grammar": st.fixed_dictionaries({"guided_grammar": TEXTS}),
    "guided_choice": st.fixed_dictionaries({"guided_choice": st.lists(TEXTS, max_size=3)}),
    "tools": st.fixed_dictionaries(
        {
            "tools": TOOLS,
            "tool_choice": st.sampled_from(
                ["auto", "required", "none", {"type": "function", "function": {"name": "f"}}, {"type": "x"}]
            ),
        }
    ),
}


@pytest.mark.parametrize("kind", FORMS)
@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_form_breaks_the_server(server: RunningServer, kind: str, data: st.DataObject) -> None:
    form = data.draw(FORMS[kind])
    body = {"model": MODEL_NAME, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, **form}
    start = time.process_time()
    response = server.shared_http.post(
        "/v1/chat/completions",
        content=json.dumps(body).encode("utf-8", "surrogatepass"),
        headers={"content-type": "application/json"},
    )
    assert time.process_time() - start < MAX_SECONDS
    assert response.status_code in (200, 400), response.text
    if response.status_code == 400:
        assert len(response.content) < 3000
        assert response.json()["error"]["message"]
