"""Speed of the engine in one process: autoregressive against Jacobi decoding, and what the time of a step is made of.

All that is compared runs in turns, prompt by prompt and round by round, so that a busy machine slows all of it alike;
what is reported are medians.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import msgspec
import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cllm_core.backends.choose import kernels_take_bfloat16
from cllm_core.backends.cpu.onednn import PackedLinear, onednn_gap, pack_linear_layers
from cllm_core.config import EngineConfig
from cllm_core.engine.build import assemble_engine
from cllm_core.engine.engine import Engine
from cllm_core.engine.runner import StepModel
from cllm_core.errors import ConfigError
from cllm_core.evaluation.answering import ChatCodec
from cllm_core.models.attention import register_paged_attention
from cllm_core.models.loader import load_model
from cllm_core.models.paged import RowSpan
from cllm_core.request import NewRequest, RequestOutput, SamplingParams
from cllm_core.text.codec import TextCodec

BUILT_IN_PROMPTS = (
    "Write a SQL query that returns the names of all singers who are older than 30, ordered by age.",
    "Question: Tom has 3 boxes with 12 pencils each and gives away 7 pencils. How many are left? Answer step by step:",
    "def fibonacci(n: int) -> list[int]:\n    ",
    "List the planets of the solar system, from the one nearest to the sun to the one farthest from it:",
)
STEP_SIZES = (1, 16, 32)
STEP_CONTEXT = 256  # tokens before the timed step


class StepSeconds(msgspec.Struct, kw_only=True):
    """Where the time of steps went, in seconds."""

    schedule: float = 0.0
    prepare: float = 0.0  # from the plan to the forward pass
    forward: float = 0.0
    choose: float = 0.0  # from logits to accepted tokens and the next draft
    commit: float = 0.0
    observe: float = 0.0  # after the commit: what the step's time teaches, and figures for metrics


class DecodingSpeed(msgspec.Struct, frozen=True, kw_only=True):
    """One way to decode, over all prompts.

    Attributes:
        name: "transformers.generate", "AR" or "Jacobi, n = ...".
        tokens_per_second: median over rounds.
        tokens_per_forward: TPF; None where not known.
        milliseconds: of one step, by part; None where not known.
    """

    name: str
    tokens_per_second: float
    tokens_per_forward: float | None = None
    milliseconds: dict[str, float] | None = None

    @property
    def share_outside_forward(self) -> float | None:
        """Part of the step time that is not the forward pass."""
        if self.milliseconds is None:
            return None
        return 1 - self.milliseconds["forward"] / sum(self.milliseconds.values())


class StepSpeed(msgspec.Struct, frozen=True, kw_only=True):
    """Forward pass of one row against the bare matrix products of its layers, medians in milliseconds."""

    num_tokens: int
    forward: float
    linear_layers: float


class EngineBench(msgspec.Struct, frozen=True, kw_only=True):
    """All results; memory in bytes, resident_bytes before the first request: nothing of a CPU's cache is in use.

    `products` says by whom the bare matrix products of `steps` are computed, `paths` by what the engine's model is.
    """

    model: str
    dtype: str
    num_threads: int
    num_prompts: int
    num_rounds: int
    max_tokens: int
    load_average: float
    decoding: list[DecodingSpeed]
    steps: list[StepSpeed]
    products: str
    paths: str
    weight_bytes: int
    cache_bytes: int
    resident_bytes: int


class TimedModel:
    """Notes when the forward pass of a step began and ended (StepModel)."""

    def __init__(self, model: StepModel) -> None:
        self._model = model
        self.device = model.device
        self.began = self.ended = 0.0

    def forward(self, input_ids: Tensor, positions: Tensor, rows: Sequence[RowSpan], sampled: Tensor) -> Tensor:
        """See PagedModel.forward."""
        self.began = time.perf_counter()
        logits = self._model.forward(input_ids, positions, rows, sampled)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.ended = time.perf_counter()
        return logits

    def clear_blocks(self, block_ids: Sequence[int]) -> None:
        """See PagedModel.clear_blocks."""
        self._model.clear_blocks(block_ids)


def bench_engine(
    config: EngineConfig,
    prompts: Sequence[str],
    *,
    chat: bool = False,
    block_lengths: Sequence[int],
    max_tokens: int,
    num_rounds: int,
) -> EngineBench:
    """Measure greedy decoding of each prompt, alone on the machine's device.

    Args:
        config: the model; its block length is used where `block_lengths` is empty.
        prompts: texts to complete.
        chat: they are messages of a user, to be answered.
        block_lengths: of Jacobi decoding, beside AR.
        max_tokens: of an output.
        num_rounds: times everything is measured.

    Raises:
        ModelLoadError, ConfigError: as in build_engine; or there is no chat template to ask with, or the cache is too
            small for the steps that are timed.
    """
    register_paged_attention()
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    engine, reference, resident_bytes = _load(config)
    _require_room(engine)
    prompt_ids = _encode(engine, prompts, chat=chat)
    ways: dict[str, Callable[[tuple[int, ...]], _Run]] = {
        "transformers.generate": partial(_run_transformers, reference, max_tokens=max_tokens),
        "AR": partial(_run_engine, engine, block_length=1, max_tokens=max_tokens),
    }
    for length in block_lengths or [engine.info.block_length]:
        ways[f"Jacobi, n = {length}"] = partial(_run_engine, engine, block_length=length, max_tokens=max_tokens)
    decoding = _measure_decoding(ways, prompt_ids, num_rounds)
    return EngineBench(
        model=engine.info.name,
        dtype=engine.info.number_format,
        num_threads=torch.get_num_threads(),
        num_prompts=len(prompts),
        num_rounds=num_rounds,
        max_tokens=max_tokens,
        load_average=psutil.getloadavg()[0],
        decoding=decoding,
        steps=[_measure_step(engine, reference, size) for size in STEP_SIZES],
        products="oneDNN's bare, prepacked products" if onednn_gap(reference) is None else "torch's bare products",
        paths=str(engine.info.paths),
        weight_bytes=engine.info.weight_bytes,
        cache_bytes=engine.info.cache_bytes,
        resident_bytes=resident_bytes,
    )


def _load(config: EngineConfig) -> tuple[Engine, PreTrainedModel, int]:
    """The engine, the same model as transformers runs it, and the bytes resident before the latter's on a CPU.

    On a GPU the reference comes first: the KV cache takes nearly all memory that it finds.
    """
    read_reference = partial(load_model, config, _ignore_progress, attn_implementation="sdpa")
    loaded = load_model(config, _ignore_progress, kernels_take_bfloat16=kernels_take_bfloat16(config))
    reference = read_reference() if loaded.model.device.type == "cuda" else None
    engine = assemble_engine(config, loaded, _ignore_progress)
    resident_bytes = psutil.Process().memory_info().rss
    return engine, (reference or read_reference()).model, resident_bytes


def _require_room(engine: Engine) -> None:
    """Raise ConfigError where the cache cannot hold the longest step timed: kernels do not look where they write."""
    num_blocks, block_size = engine.info.num_cache_blocks, engine.info.cache_block_size
    num_needed = _num_blocks(STEP_CONTEXT + max(STEP_SIZES), block_size)
    if num_blocks < num_needed:
        raise ConfigError(
            f"num_cache_blocks={num_blocks}: {num_blocks * block_size} tokens are too few to time a step of "
            f"{max(STEP_SIZES)} behind {STEP_CONTEXT}; give at least {num_needed} blocks"
        )


def _num_blocks(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)


def _encode(engine: Engine, prompts: Sequence[str], *, chat: bool) -> list[tuple[int, ...]]:
    if chat:
        template = ChatCodec(engine.info.tokenizer, engine.info.name)
        return [template.prompt_ids(prompt) for prompt in prompts]
    codec = TextCodec(engine.info.tokenizer)
    return [tuple(codec.encode(prompt, add_special_tokens=True)) for prompt in prompts]


class _Run(msgspec.Struct, kw_only=True):
    """One prompt decoded; passes yield output tokens, steps include those that only read the prompt."""

    num_tokens: int
    seconds: float
    num_forward_passes: int = 0
    num_steps: int = 0
    parts: StepSeconds | None = None


def _measure_decoding(
    ways: dict[str, Callable[[tuple[int, ...]], _Run]], prompt_ids: Sequence[tuple[int, ...]], num_rounds: int
) -> list[DecodingSpeed]:
    runs: dict[str, list[list[_Run]]] = {name: [] for name in ways}
    for way in ways.values():
        way(prompt_ids[0])  # the first run of anything is slower
    for _ in range(num_rounds):
        in_turns = [{name: way(ids) for name, way in ways.items()} for ids in prompt_ids]
        for name in ways:
            runs[name].append([run[name] for run in in_turns])
    return [_summarise(name, rounds) for name, rounds in runs.items()]


def _summarise(name: str, rounds: list[list[_Run]]) -> DecodingSpeed:
    speeds = [sum(run.num_tokens for run in one) / sum(run.seconds for run in one) for one in rounds]
    runs = [run for one in rounds for run in one]
    timed = [(run.parts, run.num_steps) for run in runs if run.parts is not None]
    num_passes = sum(run.num_forward_passes for run in runs)
    return DecodingSpeed(
        name=name,
        tokens_per_second=statistics.median(speeds),
        tokens_per_forward=sum(run.num_tokens for run in runs) / num_passes if num_passes else None,
        milliseconds={
            part: 1e3 * statistics.median(getattr(seconds, part) / steps for seconds, steps in timed)
            for part in StepSeconds.__struct_fields__
        }
        if timed
        else None,
    )


def _run_engine(engine: Engine, prompt_ids: tuple[int, ...], *, block_length: int, max_tokens: int) -> _Run:
    """One request through the engine, step by step as the worker drives it."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, block_length=block_length)
    # A salt of its own: no run may find the prompt of another in the prefix cache.
    request = NewRequest(request_id="bench", prompt_ids=prompt_ids, params=params, cache_salt=str(time.monotonic_ns()))
    outputs: list[RequestOutput] = []
    num_steps = 0
    with _timed_parts(engine) as parts:
        started = time.perf_counter()
        engine.add_request(request)
        while engine.has_work():
            outputs += engine.step()
            num_steps += 1
        seconds = time.perf_counter() - started
    ended = [output.stats for output in outputs if output.finish_reason is not None]
    return _Run(
        num_tokens=sum(stats.num_output_tokens for stats in ended),
        seconds=seconds,
        num_forward_passes=sum(stats.num_forward_passes for stats in ended),
        num_steps=num_steps,
        parts=parts,
    )


class _PartTimes:
    """Adds up the calls that a step makes, and what lies between each and the one before."""

    def __init__(self) -> None:
        self.parts = StepSeconds()
        self._last = 0.0  # when the last call ended

    def note_schedule(self, began: float, ended: float) -> None:
        self.parts.schedule += ended - began
        self._last = ended

    def note_forward(self, began: float, ended: float) -> None:
        self.parts.prepare += began - self._last
        self.parts.forward += ended - began
        self._last = ended

    def note_commit(self, began: float, ended: float) -> None:
        self.parts.choose += began - self._last
        self.parts.commit += ended - began
        self._last = ended

    def note_step(self, _: float, ended: float) -> None:
        self.parts.observe += ended - self._last
        self._last = ended


@contextmanager
def _timed_parts(engine: Engine) -> Iterator[StepSeconds]:
    """Where the time of the engine's steps goes while the block runs; the engine is left as it was."""
    times = _PartTimes()
    plain_model = engine.runner.model
    engine.runner.model = model = TimedModel(plain_model)
    try:
        with (
            _clocked(engine, "step", times.note_step),
            _clocked(engine.scheduler, "schedule", times.note_schedule),
            _clocked(model, "forward", times.note_forward),
            _clocked(engine.scheduler, "commit", times.note_commit),
        ):
            yield times.parts
    finally:
        engine.runner.model = plain_model


@contextmanager
def _clocked(owner: object, name: str, note: Callable[[float, float], None]) -> Iterator[None]:
    """While the block runs, `note` gets the begin and end, in seconds, of every call of this object's method `name`."""
    method = getattr(owner, name)

    def call(*args: object) -> object:
        began = time.perf_counter()
        result = method(*args)
        note(began, time.perf_counter())
        return result

    setattr(owner, name, call)
    try:
        yield
    finally:
        delattr(owner, name)  # the class's own shows again


def _run_transformers(model: PreTrainedModel, prompt_ids: tuple[int, ...], *, max_tokens: int) -> _Run:
    ids = torch.tensor([prompt_ids], device=model.device)
    started = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(  # type: ignore[operator]  # a mixin that torch's __getattr__ hides
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, pad_token_id=0
        )
    return _Run(num_tokens=out.shape[1] - len(prompt_ids), seconds=time.perf_counter() - started)


def _measure_step(engine: Engine, reference: PreTrainedModel, num_tokens: int, num_timings: int = 25) -> StepSpeed:
    """Forward pass of one row in turns with the matrix products it contains; writes to the first cache blocks."""
    if onednn_gap(reference) is None:
        pack_linear_layers(reference)
    linears = [module for module in reference.modules() if isinstance(module, (nn.Linear, PackedLinear))]
    parameter = next(reference.parameters())
    inputs = [
        torch.randn(num_tokens, linear.in_features, dtype=parameter.dtype, device=parameter.device)
        for linear in linears
    ]
    block_size = engine.info.cache_block_size
    span = RowSpan(0, num_tokens, STEP_CONTEXT, tuple(range(_num_blocks(STEP_CONTEXT + num_tokens, block_size))))
    index = torch.arange(num_tokens, device=parameter.device)
    model = TimedModel(engine.runner.model)
    forward, products = [], []
    with torch.inference_mode():
        for _ in range(num_timings):
            began = time.perf_counter()
            for linear, x in zip(linears, inputs, strict=True):
                linear(x)
            if parameter.device.type == "cuda":
                torch.cuda.synchronize(parameter.device)
            products.append(time.perf_counter() - began)
            model.forward(index, index + STEP_CONTEXT, [span], index)
            forward.append(model.ended - model.began)
    return StepSpeed(
        num_tokens=num_tokens,
        forward=1e3 * statistics.median(forward),
        linear_layers=1e3 * statistics.median(products),
    )


def _ignore_progress(stage: str, fraction: float) -> None:
    """Loading takes seconds."""


def as_markdown(bench: EngineBench, *, machine: str, commit: str) -> str:
    """The results as a page."""
    baseline, ar = bench.decoding[0].tokens_per_second, bench.decoding[1].tokens_per_second
    return "\n".join(
        [
            f"# Engine: {bench.model}, {bench.dtype}, {bench.num_threads} threads",
            "",
            f"{machine}; commit {commit}; load average {bench.load_average:.1f}. Greedy, one request at a time, "
            f"{bench.num_prompts} prompts, at most {bench.max_tokens} tokens, medians of {bench.num_rounds} rounds.",
            "",
            f"{bench.paths}.",
            "",
            "| | tokens/s | over transformers | over AR | tokens/forward | outside forward |",
            "|---|---|---|---|---|---|",
            *(
                f"| {way.name} | {way.tokens_per_second:.1f} | {way.tokens_per_second / baseline:.2f}x "
                f"| {way.tokens_per_second / ar:.2f}x | {_or_dash(way.tokens_per_forward, '.2f')} "
                f"| {_or_dash(way.share_outside_forward, '.1%')} |"
                for way in bench.decoding
            ),
            "",
            "| ms per step | " + " | ".join(StepSeconds.__struct_fields__) + " |",
            "|---" * (1 + len(StepSeconds.__struct_fields__)) + "|",
            *(_parts_row(way.name, way.milliseconds) for way in bench.decoding if way.milliseconds is not None),
            "",
            f"One row, {STEP_CONTEXT} tokens before it:",
            "",
            f"| tokens of the step | forward, ms | {bench.products}, ms | ratio |",
            "|---|---|---|---|",
            *(
                f"| {step.num_tokens} | {step.forward:.1f} | {step.linear_layers:.1f} "
                f"| {step.forward / step.linear_layers:.2f}x |"
                for step in bench.steps
            ),
            "",
            _memory_line(bench),
            "",
        ]
    )


def _memory_line(bench: EngineBench) -> str:
    wanted = bench.weight_bytes + bench.cache_bytes
    full = bench.resident_bytes + bench.cache_bytes
    return (
        f"Memory: {bench.resident_bytes / 2**20:.0f} MiB resident before the first request, of which weights are "
        f"{bench.weight_bytes / 2**20:.0f}; with the KV cache of {bench.cache_bytes / 2**20:.0f} MiB full "
        f"{full / wanted:.2f} times weights and cache."
    )


def _parts_row(name: str, milliseconds: dict[str, float]) -> str:
    values: Iterable[str] = (f"{value:.2f}" for value in milliseconds.values())
    return f"| {name} | " + " | ".join(values) + " |"


def _or_dash(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
