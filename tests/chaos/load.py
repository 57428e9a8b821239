"""A running load whose every answer is checked: its text against a quiet run, and that it ends, once."""

import asyncio
import itertools
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import httpx

PROMPTS = [
    f"{word} {number}" for word in ("Once upon", "The server", "abc abc abc", "select x") for number in range(15)
]
SHAPES: tuple[Mapping[str, object], ...] = (
    {"temperature": 0, "max_tokens": 12},
    {"temperature": 0, "max_tokens": 24, "stream": True},
    {"temperature": 1.0, "seed": 7, "max_tokens": 16, "stream": True},
    {"temperature": 0.8, "seed": 11, "max_tokens": 8, "n": 3},
    {"temperature": 0, "max_tokens": 10, "logprobs": 3, "block_length": 4},
    {"temperature": 0, "max_tokens": 20, "guided_regex": "[a-z]{2,9}( [0-9]{1,3})?"},
    {"temperature": 0, "max_tokens": 12, "model": "sql", "stream": True},
)

# Nothing takes as long: what has not ended by then never will.
END_SECONDS = 60.0

# What a client may be told while things go wrong, instead of an answer. A prompt that was running whenever the worker
# was killed is not tried again: here that is bad luck.
EXPECTED_ERRORS = frozenset(
    {
        *("engine_failed", "engine_unavailable", "engine_busy", "queue_timeout", "too_many_connections"),
        *("model_not_found", "prompt_crashed_worker"),
    }
)

RETRY_SECONDS = 2.0  # as Retry-After says


def requests(num_prompts: int) -> list[dict[str, object]]:
    """Bodies of all requests to so many prompts, the same in every run."""
    pairs = itertools.product(PROMPTS[:num_prompts], SHAPES)
    return [{"model": "tiny", "prompt": prompt, "ignore_eos": "guided_regex" not in s, **s} for prompt, s in pairs]


@dataclass
class Outcomes:
    """What became of the requests of a run.

    Attributes:
        counts: by outcome: "answered", or the code of the error.
        problems: what must not happen: a wrong text, no end, two ends, an error of another kind.
        stalls: seconds of the longest answers, by when they began.
    """

    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    longest: float = 0.0

    @property
    def total(self) -> int:
        """Requests that were sent."""
        return self.counts.total() + len(self.problems)


class Load:
    """Sends the requests over and over, some at a time.

    Args:
        url: of the server.
        concurrency: requests at a time.
        num_prompts: that are asked.
        expected: texts of each request's choices, as `learn` gave them.
    """

    def __init__(
        self,
        url: str,
        *,
        concurrency: int = 1,
        num_prompts: int = len(PROMPTS),
        expected: Sequence[list[str]] | None = None,
    ) -> None:
        self._url = url
        self._concurrency = concurrency
        self._expected = expected
        self._bodies = requests(num_prompts)
        self._next = itertools.count()
        self._stopped = False
        self.outcomes = Outcomes()

    async def learn(self) -> list[list[str]]:
        """The texts of all requests, sent one after the other."""
        async with self._client() as client:
            return [await self._texts(client, body) for body in self._bodies]

    async def run(self, *, at_least: int) -> None:
        """Send requests until `stop`, and at least so many."""
        async with self._client() as client, asyncio.TaskGroup() as group:
            for _ in range(self._concurrency):
                group.create_task(self._work(client, at_least))

    def stop(self) -> None:
        """Send no more than what was asked for at least."""
        self._stopped = True

    def _client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=self._concurrency)
        return httpx.AsyncClient(base_url=self._url, timeout=END_SECONDS, limits=limits, verify=False)

    async def _work(self, client: httpx.AsyncClient, at_least: int) -> None:
        while not self._stopped or self.outcomes.total < at_least:
            number = next(self._next)
            await self._send(client, number % len(self._bodies))

    async def _send(self, client: httpx.AsyncClient, index: int) -> None:
        began = time.monotonic()
        outcome = "answered"
        try:
            async with asyncio.timeout(END_SECONDS):
                texts = await self._texts(client, self._bodies[index])
            if self._expected is not None and texts != self._expected[index]:
                self.outcomes.problems.append(f"wrong text: {self._bodies[index]}: {texts}")
                return
        except _Refused as error:
            outcome = error.code
            if error.code not in EXPECTED_ERRORS:
                self.outcomes.problems.append(f"unexpected error: {error.code}: {error}")
                return
            await asyncio.sleep(RETRY_SECONDS)
        except TimeoutError:
            self.outcomes.problems.append(f"no end: {self._bodies[index]}")
            return
        except (httpx.HTTPError, _BadStream) as error:
            self.outcomes.problems.append(f"{type(error).__name__}: {error}: {self._bodies[index]}")
            return
        self.outcomes.counts[outcome] += 1
        self.outcomes.longest = max(self.outcomes.longest, time.monotonic() - began)

    async def _texts(self, client: httpx.AsyncClient, body: Mapping[str, object]) -> list[str]:
        if body.get("stream"):
            return await self._streamed(client, body)
        answer = await client.post("/v1/completions", json=body)
        if answer.status_code != 200:
            raise _Refused.of(answer.json())
        return [choice["text"] for choice in answer.json()["choices"]]

    async def _streamed(self, client: httpx.AsyncClient, body: Mapping[str, object]) -> list[str]:
        texts: dict[int, str] = {}
        ends: list[dict[str, dict[str, str]]] = []
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                raise _Refused.of(json.loads(await answer.aread()))
            async for line in answer.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if ends:
                    raise _BadStream(f"an event behind the end: {line}")
                data = line.removeprefix("data: ")
                if data == "[DONE]":
                    ends.append({})
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    ends.append(chunk)
                    continue
                for choice in chunk["choices"]:
                    texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        if not ends:
            raise _BadStream("the stream ended without an end")
        if ends[0]:
            raise _Refused.of(ends[0])
        return [texts[index] for index in sorted(texts)]


class _Refused(Exception):
    """The server answered with an error."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code

    @classmethod
    def of(cls, body: Mapping[str, Mapping[str, str]]) -> "_Refused":
        error = body["error"]
        return cls(error["code"] or error["type"], error["message"])


class _BadStream(Exception):
    """A stream that does not end, or not once."""
