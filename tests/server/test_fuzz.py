"""Whatever JSON comes in, the answer is an OpenAI object and never a 5xx."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.schemas.chat import ChatCompletionRequest
from server.schemas.completions import CompletionRequest
from server.schemas.responses import ResponseRequest
from tests.server.fakes import MODEL_NAME
from tests.server.harness import RunningServer

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS | st.sampled_from(["text", "content", "user", "auto", 0, 1, 2]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "content", "role"]), inner),
    max_leaves=6,
)
NAMES = sorted(
    ChatCompletionRequest.model_fields.keys()
    | CompletionRequest.model_fields.keys()
    | ChatCompletionRequest.refusable.keys()
    | ResponseRequest.model_fields.keys()
    | ResponseRequest.refusable.keys()
)
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
