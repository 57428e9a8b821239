"""The gateway before two apps that are called in this process."""

import json
from collections.abc import AsyncGenerator, Sequence

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import ASGIApp, Message

from cllm_core.errors import CllmError, EngineBusy, EngineUnavailable
from server.app import create_app
from server.cluster.affinity import Affinity, ReplicaOrder
from server.cluster.calls import HttpCall, answer
from server.cluster.gateway import ReplicaLost, ReplicaMetrics, create_gateway
from server.settings import ServerSettings
from tests.server.fakes import ANSWER, ScriptedEngine

CHAT = {"messages": [{"role": "user", "content": "Hello"}]}


class TwoReplicas:
    """Replicas in this process.

    Attributes:
        asked: replica of each call, in order.
        errors: raised by the next calls, one each, after so many lists of messages.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.engines = {name: ScriptedEngine() for name in ("one", "two")}
        self.apps: dict[str, ASGIApp] = {name: create_app(engine, settings) for name, engine in self.engines.items()}
        self.asked: list[str] = []
        self.errors: list[tuple[int, CllmError]] = []

    async def answer(self, call: HttpCall, affinity: Affinity) -> AsyncGenerator[list[Message]]:
        names = list(self.apps)
        name = names[ReplicaOrder().rank(affinity, names, [0, 0])[0]]
        self.asked.append(name)
        num_left, error = self.errors.pop(0) if self.errors else (-1, None)
        async for messages in answer(self.apps[name], call):
            if error is not None and num_left == 0:
                raise error
            yield messages
            num_left -= 1

    async def answer_everywhere(self, call: HttpCall) -> Sequence[list[Message]]:
        return [[message async for messages in answer(app, call) for message in messages] for app in self.apps.values()]

    async def metrics(self) -> Sequence[ReplicaMetrics]:
        return [ReplicaMetrics(name, await self._metrics(app)) for name, app in self.apps.items()]

    async def _metrics(self, app: ASGIApp) -> str:
        async with client_of(app) as client:
            return (await client.get("/metrics")).text


def client_of(app: ASGIApp) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway")


def make_gateway(**settings: object) -> tuple[TwoReplicas, httpx.AsyncClient]:
    chosen = ServerSettings(**settings)  # type: ignore[arg-type]
    replicas = TwoReplicas(chosen)
    for engine in replicas.engines.values():
        engine.become("ready")
    return replicas, client_of(create_gateway(replicas, chosen))


async def test_an_answer_is_the_replicas() -> None:
    _, client = make_gateway()
    answered = await client.post("/v1/chat/completions", json=CHAT)
    assert answered.status_code == 200
    assert answered.json()["choices"][0]["message"]["content"] == ANSWER
    unknown = await client.get("/v1/nothing")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "unknown_url")


async def test_turns_of_a_conversation_go_to_one_replica() -> None:
    replicas, client = make_gateway()
    for index in range(8):
        messages = [{"role": "user", "content": f"Hello {index}"}]
        for _ in range(3):
            await client.post("/v1/chat/completions", json={"messages": messages})
            messages += [{"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Go on."}]
        assert len(set(replicas.asked[-3:])) == 1
    assert set(replicas.asked) == {"one", "two"}


async def test_a_replica_lost_before_it_answered_costs_nothing() -> None:
    replicas, client = make_gateway()
    replicas.errors = [(0, ReplicaLost("died")), (0, ReplicaLost("died"))]
    answered = await client.post("/v1/chat/completions", json=CHAT)
    assert answered.status_code == 200
    assert len(replicas.asked) == 3


async def test_replicas_lost_in_turn_are_an_error() -> None:
    replicas, client = make_gateway()
    replicas.errors = [(0, ReplicaLost("died"))] * 3
    answered = await client.post("/v1/chat/completions", json=CHAT)
    assert (answered.status_code, answered.json()["error"]["code"]) == (503, "engine_unavailable")
    assert "Retry-After" in answered.headers


async def test_a_stream_whose_replica_dies_ends_with_an_error_event() -> None:
    replicas, client = make_gateway()
    replicas.errors = [(1, ReplicaLost("died"))]
    answered = await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
    assert answered.status_code == 200
    last = json.loads(answered.text.strip().splitlines()[-1].removeprefix("data: "))
    assert last["error"]["code"] == "engine_failed"
    assert len(replicas.asked) == 1


@pytest.mark.parametrize(
    ("error", "status"), [(EngineBusy("full", retry_after=3.0), 429), (EngineUnavailable("none there"), 503)]
)
async def test_errors_of_the_cluster_are_answers(error: CllmError, status: int) -> None:
    replicas, client = make_gateway()
    replicas.errors = [(0, error)]
    answered = await client.post("/v1/chat/completions", json=CHAT)
    assert (answered.status_code, answered.json()["error"]["message"]) == (status, str(error))
    assert "Retry-After" in answered.headers


async def test_keys_and_body_limits_hold_before_a_replica_is_asked() -> None:
    replicas, client = make_gateway(api_keys=["secret"], max_body_bytes=1024)
    assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 401
    client.headers["Authorization"] = "Bearer secret"
    too_long = {"messages": [{"role": "user", "content": "x" * 2000}]}
    assert (await client.post("/v1/chat/completions", json=too_long)).status_code == 413
    streamed = await client.post("/v1/chat/completions", content=endless())
    assert streamed.status_code == 413
    assert replicas.asked == []
    assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200


async def endless() -> AsyncGenerator[bytes]:
    for _ in range(100):
        yield b"x" * 100


async def test_metrics_are_those_of_all_replicas_told_apart() -> None:
    _, client = make_gateway()
    for index in range(8):
        await client.post("/v1/completions", json={"prompt": f"Prompt {index}"})
    scraped = (await client.get("/metrics")).text
    families = {family.name: family for family in text_string_to_metric_families(scraped)}
    ready = families["cllm_ready"].samples
    assert {sample.labels["replica"] for sample in ready} == {"one", "two"}
    requests = [sample for sample in families["cllm_requests"].samples if sample.name.endswith("_total")]
    counts = {sample.labels["replica"]: sample.value for sample in requests if "completions" in str(sample.labels)}
    assert sum(counts.values()) == 8
    assert scraped.count("# TYPE cllm_ready gauge") == 1


async def test_changes_of_adapters_reach_every_replica(tmp_path: object) -> None:
    replicas, client = make_gateway(adapter_root=str(tmp_path))
    answered = await client.post("/v1/load_lora_adapter", json={"lora_name": "sql", "lora_path": "sql"})
    assert answered.status_code == 200, answered.text
    models = [[adapter.name for adapter in engine.info.adapters] for engine in replicas.engines.values()]
    assert models == [["sql"], ["sql"]]
