"""Clients that leave, workers that die, queues that are full, bugs, and the end of the server."""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncGenerator

import httpx
import pytest
from openai import APIError
from structlog.testing import capture_logs

from cllm_core.request import DecodingStats, ErrorCode, NewRequest, RequestOutput
from server.app import create_app
from server.settings import ServerSettings
from tests.server.fakes import ANSWER, MODEL_NAME, ScriptedEngine, make_info
from tests.server.harness import RunningServer, running, wait_until

CHAT = "/v1/chat/completions"
BODY = {"model": MODEL_NAME, "messages": [{"role": "user", "content": "Hi"}]}


def endless() -> ScriptedEngine:
    """An answer that no test waits out, however busy the machine."""
    return ScriptedEngine(endless=True, step_seconds=0.01, info=make_info(max_model_len=1_000_000))


def all_closed(server: RunningServer) -> bool:
    return server.in_loop(lambda: server.engine.num_open) == 0


@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_a_stream_aborts_its_requests(n: int) -> None:
    with running(endless()) as server:
        with server.http() as http, http.stream("POST", CHAT, json={**BODY, "stream": True, "n": n}) as response:
            lines = response.iter_lines()  # kept: once collected, it closes the connection
            assert "assistant" in next(lines)
            assert server.in_loop(lambda: server.engine.num_open) == n
        wait_until(lambda: all_closed(server))
        assert len(server.engine.aborted) == n


@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_without_streaming_aborts_its_requests(n: int) -> None:
    with running(endless()) as server:
        with server.http() as http, pytest.raises(httpx.ReadTimeout):
            http.post(CHAT, json={**BODY, "n": n}, timeout=0.3)
        wait_until(lambda: all_closed(server))
        assert len(server.engine.aborted) == n
        wait_until(lambda: 'status="499"' in _metrics(server))


def test_a_client_that_leaves_while_it_sends_its_body_is_no_error_of_ours() -> None:
    with capture_logs() as logs, running(ScriptedEngine()) as server:
        address = httpx.URL(server.url)
        with socket.create_connection((address.host, address.port)) as connection:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
            connection.sendall(head.encode() + b"{")
        wait_until(lambda: any(line.get("path") == CHAT for line in logs))
        assert 'status="499"' in _metrics(server)
    (line,) = [line for line in logs if line.get("path") == CHAT]
    assert (line["event"], line["status"]) == ("request", 499)
    assert "unhandled error" not in [line["event"] for line in logs]


def _metrics(server: RunningServer) -> str:
    with server.http() as http:
        return http.get("/metrics").text


def test_a_worker_that_dies_ends_a_stream_with_an_error_event() -> None:
    with running(endless()) as server, server.http() as http:
        with http.stream("POST", CHAT, json={**BODY, "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            server.in_loop(server.engine.kill_worker)
            data = [line.removeprefix("data: ") for line in lines if line]
        error = json.loads(data[-1])["error"]
        assert (error["type"], error["code"]) == ("server_error", "engine_failed")
        assert "SIGKILL" in error["message"]
        assert "[DONE]" not in data


def test_the_sdk_raises_when_a_worker_dies_in_a_stream() -> None:
    with running(endless()) as server:
        stream = server.openai().completions.create(model=MODEL_NAME, prompt="Say:", max_tokens=100_000, stream=True)
        next(iter(stream))
        server.in_loop(server.engine.kill_worker)
        with pytest.raises(APIError, match="SIGKILL"):
            list(stream)


def test_a_worker_that_dies_fails_whole_answers_as_unavailable() -> None:
    with running(endless()) as server, server.http() as http:
        killer = threading.Thread(target=lambda: _kill_when_busy(server))
        killer.start()
        response = http.post(CHAT, json=BODY)
        killer.join()
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "engine_failed"
        assert response.headers["retry-after"]
        assert http.post(CHAT, json=BODY).json()["error"]["code"] == "engine_unavailable"
        assert http.get("/health").status_code == 200
        assert http.get("/ready").status_code == 503


def _kill_when_busy(server: RunningServer) -> None:
    wait_until(lambda: server.in_loop(lambda: server.engine.num_open) == 1)
    server.in_loop(server.engine.kill_worker)


def test_a_full_queue_is_a_429_that_says_when_to_come_back() -> None:
    with running(ScriptedEngine(capacity=2)) as server, server.http() as http:
        response = http.post(CHAT, json={**BODY, "n": 3, "stream": True})
        assert (response.status_code, response.headers["retry-after"]) == (429, "3")
        assert response.json()["error"]["code"] == "engine_busy"
        assert all_closed(server), "choices taken before the refusal must be given back"
        assert http.post(CHAT, json={**BODY, "n": 2}).status_code == 200


@pytest.mark.parametrize("state", ["starting", "restarting", "draining", "failed"])
def test_an_engine_that_is_not_ready_is_a_503(state: str) -> None:
    with running(ScriptedEngine(becomes=state), stay_up=True) as server, server.http() as http:  # type: ignore[arg-type]
        response = http.post(CHAT, json=BODY)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_unavailable")
        assert int(response.headers["retry-after"]) > 0
        assert http.get("/ready").json()["engine"] == state
        assert http.get("/health").status_code == (503 if state == "failed" else 200)


class _FailingEngine(ScriptedEngine):
    """Ends every request with this error."""

    def __init__(self, code: ErrorCode) -> None:
        super().__init__()
        self._code: ErrorCode = code

    def submit(self, request: NewRequest) -> AsyncGenerator[RequestOutput]:
        return self._fail(request)

    async def _fail(self, request: NewRequest) -> AsyncGenerator[RequestOutput]:
        stats = DecodingStats(num_prompt_tokens=1)
        yield RequestOutput(
            request_id=request.request_id,
            finish_reason="error",
            error="it took too long",
            error_code=self._code,
            stats=stats,
        )


@pytest.mark.parametrize(("code", "status"), [("queue_timeout", 503), ("ttft_timeout", 504), ("request_timeout", 504)])
def test_each_timeout_has_a_status_and_a_code_of_its_own(code: ErrorCode, status: int) -> None:
    with running(_FailingEngine(code)) as server, server.http() as http:
        response = http.post(CHAT, json=BODY)
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)
        assert response.json()["error"]["message"] == "it took too long"
        assert ("retry-after" in response.headers) == (code == "queue_timeout")
        streamed = http.post(CHAT, json={**BODY, "stream": True})
        assert f'"code":"{code}"' in streamed.text.replace('": "', '":"')


class _BuggyEngine(ScriptedEngine):
    """Raises what no caller expects: at once, or where a stream is read."""

    def __init__(self, *, at_once: bool) -> None:
        super().__init__()
        self._at_once = at_once

    def submit(self, request: NewRequest) -> AsyncGenerator[RequestOutput]:
        if self._at_once:
            raise RuntimeError("a secret detail")
        return self._break(request)

    async def _break(self, request: NewRequest) -> AsyncGenerator[RequestOutput]:
        yield RequestOutput(request_id=request.request_id, token_ids=(5,), stats=DecodingStats(num_prompt_tokens=1))
        raise RuntimeError("a secret detail")


@pytest.mark.parametrize("at_once", [True, False])
def test_a_bug_is_a_500_that_tells_an_id_and_nothing_else(at_once: bool) -> None:
    with running(_BuggyEngine(at_once=at_once)) as server, server.http() as http:
        response = http.post(CHAT, json=BODY, headers={"x-request-id": "my-id"})
        assert response.status_code == 500
        assert response.headers["x-request-id"] == "my-id"
        assert "my-id" in response.json()["error"]["message"]
        assert "secret" not in response.text
        assert "Traceback" not in response.text


def test_an_unusable_chat_template_is_told_to_the_log_only() -> None:
    info = make_info(chat_template="{% for secret %}")
    with capture_logs() as logs, running(ScriptedEngine(info=info)) as server, server.http() as http:
        response = http.post(CHAT, json=BODY)
    assert response.status_code == 500
    assert "template" not in response.text
    assert {"internal error", "the model's tokenizer or chat template cannot be used"} <= {x["event"] for x in logs}


def test_a_bug_in_a_stream_is_an_error_event_without_details() -> None:
    with running(_BuggyEngine(at_once=False)) as server, server.http() as http:
        response = http.post(CHAT, json={**BODY, "stream": True})
        assert '"code":"internal_error"' in response.text
        assert "secret" not in response.text


def test_shutdown_lets_a_running_stream_finish() -> None:
    engine = ScriptedEngine(step_seconds=0.1)
    with running(engine) as server, server.http() as http:
        with http.stream("POST", CHAT, json={**BODY, "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            server.terminate()
            data = [line.removeprefix("data: ") for line in lines if line]
        text = "".join(json.loads(line)["choices"][0]["delta"].get("content", "") for line in data[:-1])
        assert (data[-1], ANSWER.endswith(text)) == ("[DONE]", True)
    assert engine.calls[0] == "start"
    assert engine.calls[-1] == "stop"


def test_shutdown_ends_what_outlasts_the_grace_with_an_error_event() -> None:
    with running(endless(), drain_seconds=0.3) as server, server.http() as http:
        with http.stream("POST", CHAT, json={**BODY, "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            server.terminate()
            data = [line.removeprefix("data: ") for line in lines if line]
        assert json.loads(data[-1])["error"]["code"] == "engine_unavailable"
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")


class _HungEngine(ScriptedEngine):
    """Its worker confirms no abort."""

    def _abort(self, request_id: str) -> None:
        self.aborted.append(request_id)


def test_a_worker_that_hangs_is_waited_for_once() -> None:
    """Requests that it does not confirm to have ended count as running for ever."""
    engine = _HungEngine(endless=True, step_seconds=0.01, info=make_info(max_model_len=1_000_000))
    with (
        running(engine, drain_seconds=0.3) as server,
        server.http() as http,
        http.stream("POST", CHAT, json={**BODY, "stream": True}) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        server.terminate()
        assert "engine_unavailable" in list(lines)[-2]
    assert engine.calls == ["start", "drain", "stop"]


def test_under_another_server_the_app_drains_by_itself() -> None:
    engine = ScriptedEngine()
    app = create_app(engine, ServerSettings())

    async def live() -> None:
        async with app.router.lifespan_context(app):
            assert engine.calls == ["start"]

    asyncio.run(live())
    assert engine.calls == ["start", "drain", "stop"]
