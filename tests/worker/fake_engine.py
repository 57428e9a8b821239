"""A scripted engine without torch: every step gives each request the next number, counted from its prompt's last.

Prompts whose first token is one of the constants below steer it. `build` is its factory in a worker process.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec

from cllm_core.config import EngineConfig
from cllm_core.errors import InvalidRequest, ModelLoadError
from cllm_core.info import AdapterInfo, EngineStats, ModelInfo, TokenizerBundle
from cllm_core.request import DecodingStats, NewRequest, RequestOutput, SamplingParams

REFUSED = 900
BREAKS_DEVICE = 901
KILLS_PROCESS = 902
SLOW_STEPS = 903
LONG_STEP = 904
PREPARED = 905
HANGS = 906
BREAKS_ADMISSION = 907

BAD_ADAPTER = "adapters/of-another-base"
BROKEN_ADAPTER = "adapters/on-a-broken-disk"

SLOW_STEP_SECONDS = 0.02
LONG_STEP_SECONDS = 1.5
STEP_DEADLINE = 2.5  # also for a busy machine


class FakeEngine:
    """Implements cllm_core.worker.loop.StepEngine."""

    def __init__(self, config: EngineConfig) -> None:
        self.info = make_info(config.max_num_seqs)
        self._step_deadline = STEP_DEADLINE if config.step_timeout is None else config.step_timeout
        self.added: list[str] = []
        self.aborted: list[str] = []
        self.num_steps_before_command = 0  # the latest that may take long
        self.preparing: Future[None] = Future()  # of every request that has to be prepared
        self._running: dict[str, NewRequest] = {}
        self._num_output: dict[str, int] = {}
        self._leaving: list[str] = []
        self._num_steps = 0

    def add_request(self, request: NewRequest) -> None:
        self.num_steps_before_command = self._num_steps
        if request.prompt_ids[0] == REFUSED:
            raise InvalidRequest("prompt holds token 900: valid ids are 0..899")
        if request.prompt_ids[0] == BREAKS_ADMISSION:
            raise ZeroDivisionError("a secret detail")
        if request.request_id in self._running:
            raise InvalidRequest(f"request_id={request.request_id!r} is in use")
        self.added.append(request.request_id)
        self._running[request.request_id] = request
        self._num_output[request.request_id] = 0

    def prepare(self, request: NewRequest) -> Future[None] | None:
        return self.preparing if request.prompt_ids[0] == PREPARED else None

    def load_adapter(self, name: str, path: str) -> None:
        self.num_steps_before_command = self._num_steps
        if path == BAD_ADAPTER:
            raise ModelLoadError(f"{path}: the adapter does not fit fake")
        if path == BROKEN_ADAPTER:
            raise OSError("bad sector")
        info = AdapterInfo(name=name, path=path, revision="1", rank=4, num_bytes=0, block_length=8, eos_token_ids=(0,))
        self.info = msgspec.structs.replace(self.info, adapters=(*self.info.adapters, info))

    def unload_adapter(self, name: str) -> None:
        self.num_steps_before_command = self._num_steps
        kept = tuple(adapter for adapter in self.info.adapters if adapter.name != name)
        if len(kept) == len(self.info.adapters):
            raise InvalidRequest(f"adapter {name!r} is not loaded")
        self.info = msgspec.structs.replace(self.info, adapters=kept)

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        if request_id in self._running and request_id not in self._leaving:
            self._leaving.append(request_id)

    def has_work(self) -> bool:
        return len(self._running) > len(self._leaving)

    def step(self) -> list[RequestOutput]:
        self._num_steps += 1
        outputs = [self._final_abort(request_id) for request_id in self._leaving]
        self._leaving = []
        return outputs + [self._advance(request) for request in tuple(self._running.values())]

    def step_deadline(self) -> float:
        return self._step_deadline

    def stats(self) -> EngineStats:
        return EngineStats(num_running=len(self._running), num_steps=self._num_steps)

    def _final_abort(self, request_id: str) -> RequestOutput:
        request = self._running.pop(request_id)
        return RequestOutput(request_id=request_id, finish_reason="abort", stats=self._stats_of(request))

    def _advance(self, request: NewRequest) -> RequestOutput:
        _misbehave(request.prompt_ids[0])
        self._num_output[request.request_id] += 1
        num_output = self._num_output[request.request_id]
        is_last = num_output == request.params.max_tokens
        if is_last:
            del self._running[request.request_id]
        return RequestOutput(
            request_id=request.request_id,
            token_ids=(request.prompt_ids[-1] + num_output,),
            finish_reason="length" if is_last else None,
            stats=self._stats_of(request),
        )

    def _stats_of(self, request: NewRequest) -> DecodingStats:
        num_output = self._num_output[request.request_id]
        return DecodingStats(num_prompt_tokens=len(request.prompt_ids), num_output_tokens=num_output)


def _misbehave(first_token: int) -> None:
    if first_token == BREAKS_DEVICE:
        raise RuntimeError("device-side assert triggered")
    if first_token == KILLS_PROCESS:
        os._exit(77)
    if first_token == SLOW_STEPS:
        time.sleep(SLOW_STEP_SECONDS)
    if first_token == HANGS:
        time.sleep(3600)
    if first_token == LONG_STEP:
        time.sleep(LONG_STEP_SECONDS)


def make_info(max_num_seqs: int = 4) -> ModelInfo:
    return ModelInfo(
        name="fake",
        architecture="FakeForCausalLM",
        num_parameters=0,
        device="cpu",
        dtype="float32",
        eos_token_ids=(0,),
        vocab_size=900,
        block_length=1,
        max_model_len=1000,
        max_num_seqs=max_num_seqs,
        num_cache_blocks=1,
        cache_block_size=1,
        cache_bytes=0,
        weight_bytes=0,
        tokenizer=TokenizerBundle(tokenizer_json="{}"),
    )


def make_request(request_id: str = "r", *, prompt: tuple[int, ...] = (1, 2, 3), max_tokens: int = 3) -> NewRequest:
    return NewRequest(request_id=request_id, prompt_ids=prompt, params=SamplingParams(max_tokens=max_tokens))


def build(config: EngineConfig, on_progress: Callable[[str, float], None]) -> FakeEngine:
    """Engine factory for the worker process."""
    on_progress("reading nothing", 0.5)
    return FakeEngine(config)


def build_in_threads(config: EngineConfig, on_progress: Callable[[str, float], None]) -> FakeEngine:
    """Reports from several threads at once, as downloads do."""
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(on_progress, 400 * ["downloading"], (i / 400 for i in range(400))))
    return FakeEngine(config)


def build_missing_model(config: EngineConfig, on_progress: Callable[[str, float], None]) -> FakeEngine:
    """Fails as a wrong model name does."""
    raise ModelLoadError(f"model {config.model!r} does not exist: check the name")


def build_out_of_memory(config: EngineConfig, on_progress: Callable[[str, float], None]) -> FakeEngine:
    """Fails in a way that may pass."""
    raise MemoryError("no memory left")


def build_for_ever(config: EngineConfig, on_progress: Callable[[str, float], None]) -> FakeEngine:
    """Never gets done loading."""
    while True:
        on_progress("loading for ever", 0.25)
        time.sleep(0.02)
