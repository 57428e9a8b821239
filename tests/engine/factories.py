"""Engines over scripted and tiny random models, and a reader that holds them to their promises at every step."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import cast

import torch
from transformers import PreTrainedModel

from cllm_core.backends.paged_model import PagedModel
from cllm_core.backends.torch_plain import TorchBackend
from cllm_core.config import EngineConfig
from cllm_core.engine.drafters.base import Drafter
from cllm_core.engine.drafters.drafting import Drafting
from cllm_core.engine.drafters.registry import Target, make_drafters
from cllm_core.engine.engine import Engine
from cllm_core.engine.plan import StepPlan
from cllm_core.engine.runner import LaunchedStep, ModelRunner, StepModel
from cllm_core.engine.step_times import StepTimes
from cllm_core.info import DrafterInfo, ModelInfo, TokenizerBundle
from cllm_core.models.attention import PAGED_ATTENTION, register_paged_attention
from cllm_core.models.loader import LoadedModel
from cllm_core.request import (
    DecodingStats,
    FinishReason,
    NewRequest,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)
from tests.architectures import Architecture
from tests.checkpoints import build_model, build_tokenizer
from tests.engine import scripted

GREEDY = SamplingParams(temperature=0)

# A step without progress is a bug: the slowest test computes one token of one request per step.
_MAX_STEPS_PER_TOKEN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Limits of an engine; room for 8 texts of 100 tokens, unless told otherwise."""

    block_length: int = 16
    num_blocks: int = 200
    block_size: int = 4
    max_num_seqs: int = 8
    max_batched_tokens: int = 64
    max_model_len: int = 400
    prefill_step_seconds: float = 0.0
    prefix_caching: bool = True
    runs_ahead: bool = False
    drafters: tuple[str, ...] = ("own", "copy")

    @property
    def context(self) -> int:
        return min(self.max_model_len, self.num_blocks * self.block_size)


DEFAULT_SETUP = Setup()


def make_scripted_engine(setup: Setup = DEFAULT_SETUP, step_times: StepTimes | None = None) -> Engine:
    model = scripted.ScriptedModel(num_blocks=setup.num_blocks, block_size=setup.block_size)
    return _assemble(model, setup, vocab_size=scripted.VOCAB_SIZE, eos_token_ids=(scripted.EOS,), step_times=step_times)


def make_engine(architecture: Architecture, setup: Setup = DEFAULT_SETUP) -> Engine:
    """Over the tiny random model of this architecture."""
    return engine_over(paged_model(architecture), setup)


def engine_over(
    model: PreTrainedModel,
    setup: Setup = DEFAULT_SETUP,
    make: Callable[[PreTrainedModel, Setup], PagedModel] | None = None,
) -> Engine:
    """Over any model; `make` puts it on a paged cache, in the plainest way where left out."""
    paged = (make or plainly_paged)(model, setup)
    eos = model.generation_config.eos_token_id if model.generation_config else None
    eos_token_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    return _assemble(
        paged,
        setup,
        vocab_size=paged.vocab_size,
        eos_token_ids=eos_token_ids,
        tokenizer_json=tokenizer_json(),
        num_graphs=lambda: paged.num_graphs,
    )


def plainly_paged(model: PreTrainedModel, setup: Setup) -> PagedModel:
    paged = TorchBackend().prepare(model)
    paged.allocate_cache(num_blocks=setup.num_blocks, block_size=setup.block_size)
    return paged


@cache
def tokenizer_json() -> str:
    """Of the tokenizer that comes with the tiny random models."""
    text: str = build_tokenizer().backend_tokenizer.to_str()
    return text


@cache
def plain_model(architecture: Architecture) -> PreTrainedModel:
    """The tiny random model with transformers' own attention: the reference."""
    torch.set_num_threads(1)
    model = build_model(architecture)
    model.set_attn_implementation("eager")
    return model


@cache
def paged_model(architecture: Architecture) -> PreTrainedModel:
    """The same weights, to be run on a paged cache."""
    register_paged_attention()
    model = build_model(architecture)
    model.set_attn_implementation(PAGED_ATTENTION)
    return model


def greedy_ar(model: PreTrainedModel, prompt_ids: tuple[int, ...], num_tokens: int) -> list[int]:
    """transformers' greedy `generate`."""
    ids = torch.tensor([prompt_ids])
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False)  # type: ignore[operator]
    new_ids: list[int] = out[0, len(prompt_ids) :].tolist()
    return new_ids


def make_request(
    request_id: str,
    prompt_ids: Iterable[int],
    params: SamplingParams = GREEDY,
    *,
    prediction_ids: Iterable[int] = (),
    choice_index: int = 0,
    cache_salt: str = "",
) -> NewRequest:
    return NewRequest(
        request_id=request_id,
        prompt_ids=tuple(prompt_ids),
        params=params,
        prediction_ids=tuple(prediction_ids),
        choice_index=choice_index,
        cache_salt=cache_salt,
    )


@dataclass(slots=True)
class Answer:
    """All that one request was told."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None
    stats: DecodingStats = DecodingStats(num_prompt_tokens=0)  # noqa: RUF009 - frozen


class Reader:
    """Steps an engine and keeps its outputs; checks its invariants after every step.

    Every output belongs to a request that is not finished, and the cache's books are right.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.answers: dict[str, Answer] = {}

    def add(self, request: NewRequest) -> None:
        self.engine.add_request(request)
        self.answers[request.request_id] = Answer()

    def step(self) -> list[RequestOutput]:
        outputs = self.engine.step()
        self.engine.check()
        for output in outputs:
            answer = self.answers[output.request_id]
            assert answer.finish_reason is None, f"{output.request_id} heard of again after its end"
            answer.token_ids += output.token_ids
            answer.logprobs += output.logprobs or ()
            answer.finish_reason, answer.stop_token_id = output.finish_reason, output.stop_token_id
            answer.error, answer.stats = output.error, output.stats
        return outputs

    def drain(self) -> dict[str, Answer]:
        """Step until there is no work; every request has ended and every block is free then."""
        bound = _MAX_STEPS_PER_TOKEN * self.engine.info.max_model_len * (1 + len(self.answers))
        for _ in range(bound):
            if not self.engine.has_work():
                break
            self.step()
        assert not self.engine.has_work(), f"still at work after {bound} steps"
        assert all(answer.finish_reason for answer in self.answers.values())
        assert self.engine.block_pool.num_free == self.engine.block_pool.num_blocks
        return self.answers


class Launches:
    """What an engine launches from now on: the steps, in order, and how many of them ahead."""

    def __init__(self, engine: Engine) -> None:
        self.steps: list[LaunchedStep] = []
        self.num_ahead = 0
        self._launch = engine.runner.launch
        engine.runner.launch = self  # type: ignore[method-assign]

    def __call__(self, plan: StepPlan, *, behind: LaunchedStep | None = None) -> LaunchedStep:
        self.steps.append(self._launch(plan, behind=behind))
        self.num_ahead += behind is not None
        return self.steps[-1]


def decode(engine: Engine, requests: Iterable[NewRequest]) -> dict[str, Answer]:
    """Add all requests, then run to the end."""
    reader = Reader(engine)
    for request in requests:
        reader.add(request)
    return reader.drain()


def decode_one(engine: Engine, request: NewRequest) -> Answer:
    return decode(engine, [request])[request.request_id]


def text_drafters(config: EngineConfig) -> tuple[Drafter, ...]:
    """The sources that the settings name; of those that know texts only, as the model to draft for is not given."""
    made = make_drafters(Target(config, cast(LoadedModel, None), cast(PagedModel, None)))
    return tuple(one.drafter for one in made)


def _assemble(
    model: StepModel,
    setup: Setup,
    *,
    vocab_size: int,
    eos_token_ids: tuple[int, ...],
    tokenizer_json: str = "",
    step_times: StepTimes | None = None,
    num_graphs: Callable[[], int] = lambda: 0,
) -> Engine:
    config = EngineConfig(
        max_num_seqs=setup.max_num_seqs,
        max_batched_tokens=setup.max_batched_tokens,
        prefill_step_seconds=setup.prefill_step_seconds,
        prefix_caching=setup.prefix_caching,
        drafters=setup.drafters,
    )
    drafters = text_drafters(config)
    info = ModelInfo(
        name="test",
        architecture="test",
        num_parameters=1,
        device="cpu",
        dtype="float32",
        eos_token_ids=eos_token_ids,
        vocab_size=vocab_size,
        block_length=setup.block_length,
        max_model_len=setup.context,
        max_num_seqs=setup.max_num_seqs,
        num_cache_blocks=setup.num_blocks,
        cache_block_size=setup.block_size,
        cache_bytes=1,
        weight_bytes=1,
        tokenizer=TokenizerBundle(tokenizer_json=tokenizer_json),
        drafters=tuple(DrafterInfo(name=source.name) for source in drafters),
    )
    runner = ModelRunner(model, max_model_len=setup.context, drafting=Drafting(drafters), num_graphs=num_graphs)
    engine = Engine(config, info, runner, step_times)
    engine.runs_ahead = setup.runs_ahead
    return engine
