"""What the usage object tells: predicted tokens, and how the call was decoded where the client asks."""

import json
from typing import Any

import pytest

from tests.server.fakes import ANSWER, MODEL_NAME
from tests.server.harness import RunningServer

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
BODIES: dict[str, dict[str, object]] = {
    CHAT: {"model": MODEL_NAME, "messages": [{"role": "user", "content": "Hi"}]},
    COMPLETIONS: {"model": MODEL_NAME, "prompt": "Say:", "max_tokens": 100},
}


def usage_of(server: RunningServer, path: str, **fields: object) -> Any:
    response = server.shared_http.post(path, json={**BODIES[path], **fields})
    assert response.status_code == 200, response.text
    return response.json()["usage"]


def streamed_usage(server: RunningServer, path: str, **options: object) -> Any:
    """The usage of the stream's last chunk."""
    body = {**BODIES[path], "stream": True, "stream_options": options}
    *_, last, done = server.shared_http.post(path, json=body).text.split("\n\n")[:-1]
    assert done == "data: [DONE]"
    return json.loads(last.removeprefix("data: "))["usage"]


@pytest.mark.parametrize("path", BODIES)
def test_without_a_prediction_the_details_are_zero(server: RunningServer, path: str) -> None:
    details = usage_of(server, path)["completion_tokens_details"]
    names = ("reasoning_tokens", "audio_tokens", "accepted_prediction_tokens", "rejected_prediction_tokens")
    assert details == dict.fromkeys(names, 0)


def test_what_differs_from_a_prediction_is_neither_accepted_nor_are_its_tokens_counted_as_output(
    server: RunningServer,
) -> None:
    prediction = {"type": "content", "content": ANSWER.replace("sky", "sea")}
    usage = usage_of(server, CHAT, prediction=prediction, n=2)
    num_answer = len(server.engine.answer_ids)
    details = usage["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] == 2 * (num_answer - len("ky"))
    assert details["rejected_prediction_tokens"] == 2 * len("ea")
    assert usage["completion_tokens"] == 2 * (num_answer + 1)


def test_a_streamed_answer_has_the_usage_of_the_whole_one(server: RunningServer) -> None:
    assert streamed_usage(server, CHAT, include_usage=True) == usage_of(server, CHAT)


@pytest.mark.parametrize("path", BODIES)
def test_decoding_statistics_come_only_on_request(server: RunningServer, path: str) -> None:
    assert "decoding" not in usage_of(server, path)
    usage = usage_of(server, path, include_decoding_stats=True, n=2)
    decoding = usage["decoding"]
    assert decoding["cached_tokens"] == 1
    assert decoding["tokens_per_forward"] == pytest.approx(
        usage["completion_tokens"] / decoding["forward_passes"], abs=1e-3
    )


@pytest.mark.parametrize("path", BODIES)
def test_a_stream_asked_for_statistics_ends_with_the_usage_that_holds_them(server: RunningServer, path: str) -> None:
    streamed = streamed_usage(server, path, include_decoding_stats=True)
    assert streamed == usage_of(server, path, include_decoding_stats=True)


def test_statistics_leave_usage_out_where_they_were_declined(server: RunningServer) -> None:
    assert "decoding" not in streamed_usage(server, CHAT, include_usage=True, include_decoding_stats=False)
