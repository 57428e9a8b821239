"""Whatever the source of drafts, outputs are what decoding token by token gives (float32).

A source is added by its name to DRAFTERS in `cllm_core.config`, or here to LOADED as it is written with its path.
"""

import random
from functools import cache
from pathlib import Path

import msgspec
import pytest

from cllm_core.config import DRAFTERS, EngineConfig
from cllm_core.engine.build import build_engine
from cllm_core.engine.engine import Engine
from cllm_core.request import NewRequest, SamplingParams
from cllm_core.text.grammar import regex_grammar
from tests.checkpoints import VOCAB_SIZE, write_adapter
from tests.engine.factories import Reader, decode, decode_one

LOADED: tuple[str, ...] = ()
SOURCES = [*((name,) for name in (*DRAFTERS, *LOADED)), (*DRAFTERS, *LOADED)]

NUM_NEW = 24
NUM_ROUNDS = 2  # the second finds what the first left in a source's memory
ROOMY_POOL, SMALL_POOL = 400, 26  # blocks of 4 tokens; the longest text needs 15

FORM = regex_grammar(r"([a-f]{2,4} (the server|the client) ){1,3}end")
KINDS: dict[str, SamplingParams] = {
    "greedy": SamplingParams(temperature=0),
    "seeded": SamplingParams(temperature=0.8, top_p=0.95, seed=3),
    "penalties": SamplingParams(temperature=0, frequency_penalty=0.4, repetition_penalty=1.2),
    "seeded penalties": SamplingParams(temperature=0.3, seed=4, presence_penalty=0.6),
    "grammar": SamplingParams(temperature=0, grammar=FORM),
    "seeded grammar": SamplingParams(temperature=0.9, seed=5, grammar=FORM),
    "repetitive": SamplingParams(temperature=0, logit_bias={7: 100.0, 9: 99.0}, repetition_penalty=1.5),
}
ADAPTERS = ("", "sql")


@cache
def prompts() -> list[tuple[int, ...]]:
    draw = random.Random(1)
    stem = tuple(draw.randrange(3, VOCAB_SIZE) for _ in range(18))
    return [(5,), stem, (*stem[:13], 8, 9), (*stem, *stem[:11])]


def requests(block_length: int | None = None) -> list[NewRequest]:
    """Every kind with each adapter and without."""
    found = []
    for number, (kind, params) in enumerate(KINDS.items()):
        for adapter in ADAPTERS:
            full = msgspec.structs.replace(params, max_tokens=NUM_NEW, block_length=block_length)
            prompt = prompts()[number % len(prompts())]
            found.append(NewRequest(request_id=f"{kind}/{adapter}", prompt_ids=prompt, params=full, adapter=adapter))
    return found


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_adapter(tmp_path_factory.mktemp("laws") / "sql", tiny_llama, r=8))


@pytest.fixture
def make(tiny_llama: Path, adapter: str) -> "EngineFactory":
    return EngineFactory(tiny_llama, adapter)


class EngineFactory:
    """Builds engines as `cllm serve` does, with an adapter beside the model."""

    def __init__(self, model: Path, adapter: str) -> None:
        self._model, self._adapter = model, adapter

    def __call__(self, drafters: tuple[str, ...] = ("own",), **settings: object) -> Engine:
        limits = {
            "dtype": "float32",
            "device": "cpu",
            "num_cache_blocks": ROOMY_POOL,
            "cache_block_size": 4,
            "max_num_seqs": 6,
            "adaptive_block_length": False,
        }
        return build_engine(
            EngineConfig(
                model=str(self._model),
                adapters={"sql": self._adapter},
                drafters=drafters,
                **{**limits, **settings},  # type: ignore[arg-type]
            )
        )


_expected: dict[str, list[int]] = {}


def expected(make: EngineFactory) -> dict[str, list[int]]:
    """Token by token, each alone, in one engine without a prefix cache."""
    if not _expected:
        engine = make(block_length=1, prefix_caching=False)
        for request in requests(block_length=1):
            _expected[request.request_id] = decode_one(engine, request).token_ids
    return _expected


@pytest.mark.parametrize("drafters", SOURCES, ids=",".join)
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_alone_every_output_is_that_of_ar(make: EngineFactory, drafters: tuple[str, ...], prefix_caching: bool) -> None:
    engine = make(drafters, prefix_caching=prefix_caching, block_length=8)
    for _ in range(NUM_ROUNDS):
        found = {request.request_id: decode_one(engine, request).token_ids for request in requests()}
        assert found == expected(make)


@pytest.mark.parametrize("drafters", SOURCES, ids=",".join)
@pytest.mark.parametrize("num_blocks", [ROOMY_POOL, SMALL_POOL])
@pytest.mark.parametrize("adaptive", [True, False])
def test_in_any_batch_every_output_is_that_of_ar(
    make: EngineFactory, drafters: tuple[str, ...], num_blocks: int, adaptive: bool
) -> None:
    draw = random.Random(num_blocks)
    engine = make(
        drafters,
        num_cache_blocks=num_blocks,
        max_batched_tokens=37,
        prefix_caching=num_blocks == SMALL_POOL,
        adaptive_block_length=adaptive,
    )
    num_preemptions = 0
    for _ in range(NUM_ROUNDS):
        reader = Reader(engine)
        for request in draw.sample(requests(), k=len(requests())):
            params = msgspec.structs.replace(request.params, block_length=draw.choice([2, 5, 16]))
            reader.add(msgspec.structs.replace(request, params=params))
            for _ in range(draw.randrange(3)):
                reader.step()
        answers = reader.drain()
        assert {name: answer.token_ids for name, answer in answers.items()} == expected(make)
        num_preemptions += sum(answer.stats.num_preemptions for answer in answers.values())
    assert (num_preemptions > 0) == (num_blocks == SMALL_POOL)


def test_requests_of_one_batch_may_name_other_sources(make: EngineFactory) -> None:
    engine = make((*DRAFTERS, *LOADED))
    names = [drafter.name for drafter in engine.info.drafters]
    mixed = [
        msgspec.structs.replace(
            request, params=msgspec.structs.replace(request.params, drafters=(names[index % len(names)],))
        )
        for index, request in enumerate(requests())
    ]
    for _ in range(NUM_ROUNDS):
        found = {name: answer.token_ids for name, answer in decode(engine, mixed).items()}
        assert found == expected(make)
