"""Whatever JSON comes in, the answer is an OpenAI object and never a 5xx."""

import gzip
import json
import time

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.openai.chat.request import ChatCompletionRequest
from server.openai.completions.request import CompletionRequest
from server.openai.responses.request import ResponseRequest
from tests.compatibility_page import known_fields
from tests.server.fakes import MODEL_NAME
from tests.server.harness import RunningServer

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS | st.sampled_from(["text", "content", "user", "auto", 0, 1, 2]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "content", "role"]), inner),
    max_leaves=6,
)
NAMES = sorted(known_fields(ChatCompletionRequest) | known_fields(CompletionRequest) | known_fields(ResponseRequest))
BASE = {"model": MODEL_NAME, "max_tokens": 4}
ENDPOINTS: dict[str, dict[str, object]] = {
    "/v1/chat/completions": {**BASE, "messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {**BASE, "prompt": "Hi"},
    "/v1/responses": {"model": MODEL_NAME, "max_output_tokens": 4, "input": "Hi"},
    "/tokenize": {"model": MODEL_NAME, "prompt": "Hi"},
}


@pytest.mark.parametrize("path", ENDPOINTS)
@given(fields=st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_body_breaks_the_server(server: RunningServer, path: str, fields: dict[str, object]) -> None:
    body = json.dumps({**ENDPOINTS[path], **fields}).encode("utf-8", "surrogatepass")
    response = server.shared_http.post(path, content=body, headers={"content-type": "application/json"})
    if response.status_code == 200:
        assert response.headers["content-type"].partition(";")[0] in ("application/json", "text/event-stream")
    else:
        assert response.status_code in (400, 404)
        assert response.json()["error"]["message"]


MAX_SECONDS = 1.0  # of the processor, server and client together
JSON_HEADERS = {"content-type": "application/json"}

# What JSON forbids, what its parsers disagree about, and what overflows them.
FRAGMENTS = [
    b"NaN", b"-Infinity", b"1e999", b"-0", b"0123", b"1" * 5000, b'"\\ud800"', b"\xed\xa0\x80", b"\xff",
    b"\xef\xbb\xbf", b"\x00", b'"', b"'", b"\\", b"[" * 300, b"]", b"{", b"}", b",", b":", b"null", b"true",
    b"/*", b'"model":1,',
]  # fmt: skip


def edits(size: int) -> st.SearchStrategy[list[tuple[int, int, bytes]]]:
    """Places in a text, how many bytes to drop there, and what to put in."""
    edit = st.tuples(st.integers(0, size), st.integers(0, 8), st.sampled_from(FRAGMENTS) | st.binary(max_size=4))
    return st.lists(edit, min_size=1, max_size=3)


@pytest.mark.parametrize("path", ENDPOINTS)
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_body_is_refused_or_still_means_something(
    server: RunningServer, path: str, data: st.DataObject
) -> None:
    body = json.dumps(ENDPOINTS[path]).encode()
    for place, num_dropped, inserted in data.draw(edits(len(body))):
        body = body[:place] + inserted + body[place + num_dropped :]
    assert_refused_or_served(server, path, body)


@pytest.mark.parametrize("path", ENDPOINTS)
@given(body=st.binary(max_size=200))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bytes_that_are_no_json_are_refused(server: RunningServer, path: str, body: bytes) -> None:
    assert post(server, path, body).status_code == 400


def assert_refused_or_served(server: RunningServer, path: str, body: bytes) -> None:
    """An OpenAI error object, or an answer to JSON that is valid; either within a second, and the server goes on."""
    start = time.process_time()
    response = post(server, path, body)
    assert time.process_time() - start < MAX_SECONDS
    if response.status_code == 200:
        json.loads(body)
    else:
        assert response.status_code in (400, 404)
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert post(server, path, json.dumps(ENDPOINTS[path]).encode()).status_code == 200


def post(server: RunningServer, path: str, body: bytes, **headers: str) -> httpx.Response:
    return server.shared_http.post(path, content=body, headers=JSON_HEADERS | headers)


@pytest.mark.parametrize("path", ENDPOINTS)
def test_a_field_given_twice_is_refused(server: RunningServer, path: str) -> None:
    """The parser would take the last one, and the other would be ignored."""
    body = json.dumps(ENDPOINTS[path])
    response = post(server, path, f'{body[:-1]}, "model": "other"}}'.encode())
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "model"


def test_a_field_given_twice_is_refused_at_any_depth(server: RunningServer) -> None:
    body = f'{{"model": "{MODEL_NAME}", "messages": [{{"role": "user", "content": "a", "content": "b"}}]}}'
    assert post(server, "/v1/chat/completions", body.encode()).json()["error"]["param"] == "content"


@pytest.mark.parametrize("path", ENDPOINTS)
def test_a_compressed_body_is_refused_as_such(server: RunningServer, path: str) -> None:
    """Nothing is unpacked, so nothing small can grow."""
    body = gzip.compress(json.dumps(ENDPOINTS[path]).encode())
    response = post(server, path, body, **{"content-encoding": "gzip"})
    assert response.status_code == 415
    assert response.json()["error"]["code"] == "unsupported_media_type"
