"""ScriptedEngine: an EngineClient without model or worker, whose answer to every request is known in advance."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence

import msgspec

from cllm_core.errors import EngineBusy, EngineUnavailable, InvalidRequest
from cllm_core.info import AdapterInfo, EngineStats, ModelInfo, TokenizerBundle
from cllm_core.request import DecodingStats, NewRequest, RequestOutput, RequestTimes, SamplingDefaults, TokenLogprobs
from cllm_core.text.codec import TextCodec
from cllm_core.worker.engine_client import EngineState, EngineStatus
from cllm_core.worker.messages import StepReport
from cllm_core.worker.streams import LiveStreams
from tests.text.factories import BOS, END, byte_level, id_of

MODEL_NAME = "org/tiny-cllm"
ANSWER = "The sky is blue, très blue \N{BUTTERFLY}, and so on."
DRAFT = "unsettled"
"""What every step but the last reports as its draft."""

Answer = str | Callable[[str], str]

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_info(
    *,
    max_model_len: int = 512,
    chat_template: str | None = CHAT_TEMPLATE,
    more_tokens: Sequence[str] = (),
    sampling_defaults: SamplingDefaults | None = None,
) -> ModelInfo:
    """A model with a byte-level tokenizer, so that any text has tokens and characters span several of them."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens(list(more_tokens))
    return ModelInfo(
        name=MODEL_NAME,
        architecture="ScriptedForCausalLM",
        num_parameters=1_000_000,
        device="cpu",
        dtype="float32",
        eos_token_ids=(id_of(tokenizer, END),),
        vocab_size=tokenizer.get_vocab_size(),
        block_length=16,
        max_model_len=max_model_len,
        max_num_seqs=4,
        num_cache_blocks=64,
        cache_block_size=16,
        cache_bytes=1 << 20,
        weight_bytes=4 << 20,
        tokenizer=TokenizerBundle(
            tokenizer_json=tokenizer.to_str(),
            chat_template=chat_template,
            special_tokens={"bos_token": BOS, "eos_token": END},
        ),
        sampling_defaults=sampling_defaults or SamplingDefaults(),
    )


def make_adapter(name: str, path: str, *, tokenizer: TokenizerBundle | None = None) -> AdapterInfo:
    return AdapterInfo(
        name=name,
        path=path,
        revision=f"of {path}",
        rank=8,
        num_bytes=1024,
        block_length=32,
        domain="text-to-sql",
        eos_token_ids=make_info().eos_token_ids,
        tokenizer=tokenizer,
    )


class ScriptedEngine:
    """Answers every request with the tokens of one text, some at a time, then with the end-of-sequence token.

    Args:
        answer: the text, or what writes it for the text of a prompt.
        chunk_sizes: how many tokens each step accepts, over and over; 1, 1, 1, ... would be AR.
        step_seconds: pause before each step.
        endless: say the answer again and again, until max_tokens or an abort.
        capacity: requests taken at once; more are refused as busy.
        max_requests: that a user may ever have.
        becomes: state that start() leads to.
    """

    def __init__(
        self,
        answer: Answer = ANSWER,
        *,
        chunk_sizes: Sequence[int] = (1, 4, 2, 7, 3),
        step_seconds: float = 0.0,
        endless: bool = False,
        capacity: int = 1000,
        max_requests: int = 1000,
        info: ModelInfo | None = None,
        becomes: EngineState = "ready",
    ) -> None:
        self._info = info or make_info()
        self._codec = TextCodec(self._info.tokenizer)
        self._answer = answer
        self.draft_ids = tuple(self.encode(DRAFT))
        self._chunk_sizes = tuple(chunk_sizes)
        self._step_seconds = step_seconds
        self._endless = endless
        self._capacity = capacity
        self._max_requests = max_requests
        self._becomes: EngineState = becomes
        self._streams = LiveStreams()
        self._players: dict[str, asyncio.Task[None]] = {}
        self._listeners: list[Callable[[StepReport], None]] = []
        self.status = EngineStatus(state="starting", detail="loading weights", progress=0.25)
        self.stats = EngineStats(num_cache_blocks=64, num_free_blocks=48)
        self.requests: list[NewRequest] = []
        self.aborted: list[str] = []
        self.calls: list[str] = []

    @property
    def info(self) -> ModelInfo:
        if self.status.state == "starting":
            raise EngineUnavailable("the engine is starting: loading weights")
        return self._info

    @property
    def num_open(self) -> int:
        """Streams that nobody has read to the end or closed."""
        return len(self._players)

    @property
    def worker_pid(self) -> int | None:
        return None

    def max_requests(self, user: str) -> int:
        return self._max_requests

    def submit(self, request: NewRequest) -> AsyncGenerator[RequestOutput]:
        if self.status.state != "ready":
            raise EngineUnavailable(f"the engine is {self.status.state}")
        if self.num_open >= self._capacity:
            raise EngineBusy("the queue is full: try again later", retry_after=2.5)
        self.requests.append(request)
        stream = self._streams.open(request, self._abort)
        self._players[request.request_id] = asyncio.create_task(self._play(request))
        return stream

    def add_step_listener(self, listener: Callable[[StepReport], None]) -> None:
        self._listeners.append(listener)

    async def load_adapter(self, name: str, path: str) -> None:
        if path.startswith("/"):
            raise InvalidRequest(f"{path}: lies outside of the folder that adapters may be loaded from")
        adapter = make_adapter(name, path)
        self._info = msgspec.structs.replace(self._info, adapters=(*self._info.adapters, adapter))

    async def unload_adapter(self, name: str) -> None:
        kept = tuple(adapter for adapter in self._info.adapters if adapter.name != name)
        self._info = msgspec.structs.replace(self._info, adapters=kept)

    async def start(self) -> None:
        self.calls.append("start")
        self.become(self._becomes)

    async def drain(self, grace_seconds: float) -> None:
        self.calls.append("drain")
        self.become("draining")
        try:
            async with asyncio.timeout(grace_seconds):
                await self._streams.wait_idle()
        except TimeoutError:
            for request_id in self._streams.abort_all():
                self._abort(request_id)

    async def stop(self) -> None:
        self.calls.append("stop")
        self.become("stopped")

    @property
    def answer_ids(self) -> list[int]:
        """Tokens of the one text that answers every prompt."""
        assert isinstance(self._answer, str), "the answer depends on the prompt"
        return self.encode(self._answer)

    def say(self, answer: Answer) -> None:
        """Answer so from now on."""
        self._answer = answer

    def encode(self, text: str) -> list[int]:
        """Tokens of a text that the model writes."""
        return self._codec.encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens that the engine was given."""
        return self._codec.decode(token_ids)

    def token_text(self, token_id: int) -> str:
        """Text of one token, special ones spelled out."""
        return self._codec.token_text(token_id)

    def become(self, state: EngineState) -> None:
        """Change the status."""
        self.status = EngineStatus(state=state, detail=f"scripted to be {state}", progress=float(state == "ready"))

    def grow(self, capacity: int) -> None:
        """Take this many requests at once from now on."""
        self._capacity = capacity

    def give_up(self) -> None:
        """Fail for good."""
        self.status = EngineStatus(state="failed", detail="it crashed too often")

    def kill_worker(self) -> None:
        """Do what the client does when the worker dies: every running request ends in an error."""
        self.become("restarting")
        for player in self._players.values():
            player.cancel()
        self._players.clear()
        self._streams.fail_all("the worker process was killed by SIGKILL")

    def _abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        player = self._players.pop(request_id)
        player.cancel()
        stats = DecodingStats(num_prompt_tokens=0)
        self._streams.deliver(RequestOutput(request_id=request_id, finish_reason="abort", stats=stats))

    async def _play(self, request: NewRequest) -> None:
        num_tokens = num_passes = 0
        for chunk in self._chunks(request):
            await asyncio.sleep(self._step_seconds)
            num_tokens, num_passes = num_tokens + len(chunk), num_passes + 1
            stats = DecodingStats(
                num_prompt_tokens=len(request.prompt_ids),
                num_cached_tokens=1,
                num_output_tokens=num_tokens,
                num_forward_passes=num_passes,
            )
            self._deliver(self._output(request, chunk, stats))

    def _chunks(self, request: NewRequest) -> Iterator[tuple[int, ...]]:
        """The scripted tokens, cut into steps and at max_tokens."""
        if self._limit(request) == 0:
            yield ()
            return
        answer = self._answer if isinstance(self._answer, str) else self._answer(self.decode(request.prompt_ids))
        answer_ids = self.encode(answer)
        endless = itertools.cycle(answer_ids)
        ids = endless if self._endless else itertools.chain(answer_ids, self._info.eos_token_ids)
        limited = itertools.islice(ids, self._limit(request))
        for size in itertools.cycle(self._chunk_sizes):
            if not (chunk := tuple(itertools.islice(limited, size))):
                return
            yield chunk

    def _output(self, request: NewRequest, chunk: tuple[int, ...], stats: DecodingStats) -> RequestOutput:
        ends = chunk[-1:] == self._info.eos_token_ids
        is_full = stats.num_output_tokens == self._limit(request)
        return RequestOutput(
            request_id=request.request_id,
            token_ids=chunk,
            logprobs=_logprobs(chunk, request),
            prompt_logprobs=_prompt_logprobs(request) if stats.num_forward_passes == 1 else None,
            finish_reason="stop" if ends else "length" if is_full else None,
            stop_token_id=chunk[-1] if ends else None,
            draft_ids=self.draft_ids if request.wants_draft and not (ends or is_full) else (),
            times=RequestTimes(queue=0.0, prefill=0.0, decode=0.0) if ends or is_full else None,
            stats=stats,
        )

    def _limit(self, request: NewRequest) -> int:
        room = self._info.max_model_len - len(request.prompt_ids)
        return room if request.params.max_tokens is None else request.params.max_tokens

    def _deliver(self, output: RequestOutput) -> None:
        if output.finish_reason is not None:
            del self._players[output.request_id]
        self._streams.deliver(output)
        report = StepReport((output,), (EngineStats(accepted_per_row=(len(output.token_ids),)),))
        for listener in self._listeners:
            listener(report)


def _logprobs(chunk: tuple[int, ...], request: NewRequest) -> tuple[TokenLogprobs, ...] | None:
    """-1/2, -1/3, ... for every token of choice 0, 1, ..., and as alternatives the tokens of the lowest ids."""
    num_alternatives = request.params.logprobs
    if num_alternatives is None:
        return None
    logprob = -1.0 / (2 + request.choice_index)
    top_ids = tuple(range(num_alternatives))
    tops = tuple(-1.0 - token_id for token_id in top_ids)
    return tuple(TokenLogprobs(logprob, top_ids, tops) for _ in chunk)


def _prompt_logprobs(request: NewRequest) -> tuple[TokenLogprobs, ...] | None:
    """Of each prompt token but the first -1/its position, and as alternatives itself and tokens of the lowest ids."""
    num_alternatives = request.params.prompt_logprobs
    if num_alternatives is None:
        return None
    return tuple(
        TokenLogprobs(
            -1 / position, (token_id, 0, 1)[:num_alternatives], (-1 / position, -2.0, -3.0)[:num_alternatives]
        )
        for position, token_id in enumerate(request.prompt_ids[1:], start=1)
    )
