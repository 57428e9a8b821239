"""LLM: the engine as a library call, without server or worker process.

from cllm_core import LLM, SamplingParams

llm = LLM("path/or/hub-id")
for result in llm.generate(["Once upon a time"], SamplingParams(temperature=0, max_tokens=64)):
    print(result.text, result.outputs[0].stats.tokens_per_forward)
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import get_args

import msgspec
from tqdm import tqdm

from cllm_core.config import EngineConfig
from cllm_core.engine.build import ProgressCallback, build_engine
from cllm_core.engine.engine import Engine
from cllm_core.errors import ConfigError, EngineFailed, InvalidRequest
from cllm_core.info import ModelInfo, TokenizerBundle
from cllm_core.request import DecodingStats, FinishReason, NewRequest, RequestOutput, SamplingParams, TokenLogprobs
from cllm_core.text.chat_template import ChatTemplate
from cllm_core.text.codec import TextCodec
from cllm_core.text.dialect import Dialect, find_dialect
from cllm_core.text.expected_answer import ExpectedAnswer
from cllm_core.text.reasoning.formats import ReasoningFormatChoice
from cllm_core.text.stream import OutputText, PlacedLogprobs, TextDelta

Prompt = str | Sequence[int]
Message = Mapping[str, object]
Params = SamplingParams | Sequence[SamplingParams] | None


@dataclass(frozen=True, slots=True)
class GeneratedOutput:
    """One finished output.

    Attributes:
        text: without stop token and stop string.
        token_ids: all tokens generated, a stop token and the tokens of a stop string included.
        logprobs: of the tokens of the text where asked for, else empty.
        prompt_logprobs: of the prompt's tokens from the second on where asked for, else empty.
        finish_reason: "stop" or "length"; "error" where the output could not go on, with what came before.
        stats: forward passes and tokens per forward pass (TPF) of this output.
        reasoning: what the model thought before the text of a conversation's answer; empty where it did not.
        error: why the output could not go on, None where it could.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PlacedLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason
    stats: DecodingStats
    reasoning: str = ""
    error: str | None = None


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A prompt and its outputs, one per choice."""

    prompt_ids: tuple[int, ...]
    outputs: tuple[GeneratedOutput, ...]

    @property
    def text(self) -> str:
        """Of the first output."""
        return self.outputs[0].text


class LLM:
    """A loaded model that decodes batches of prompts.

    Args:
        model: Hub id, folder, .gguf file or built-in name; None is cllm-chat, the built-in default.
        on_progress: called with (stage, fraction) while the model loads.
        reasoning_format: how the model marks what it thinks before it answers; "auto" as its chat template shows,
            "none" leaves it in the text.
        settings: any other field of EngineConfig; adapters={"sql": "path/or/hub-id"} serves adapters beside the model.

    Raises:
        ConfigError: a setting is unknown or wrong.
        ModelLoadError: the model cannot be loaded.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        on_progress: ProgressCallback | None = None,
        reasoning_format: ReasoningFormatChoice = "auto",
        **settings: object,
    ) -> None:
        if reasoning_format not in get_args(ReasoningFormatChoice):
            known = ", ".join(get_args(ReasoningFormatChoice))
            raise ConfigError(f"reasoning_format={reasoning_format!r}: must be one of {known}")
        try:
            config = msgspec.convert({"model": model, **settings}, EngineConfig)
        except msgspec.ValidationError as error:
            raise ConfigError(f"LLM settings: {error}; see EngineConfig for names and types") from error
        self._engine = build_engine(config, on_progress)
        self._tools = _text_tools(self._engine.info, reasoning_format)
        self._request_numbers = itertools.count()

    @property
    def engine(self) -> Engine:
        """The engine underneath, for those who drive or observe it step by step."""
        return self._engine

    @property
    def info(self) -> ModelInfo:
        """The loaded model and the limits in force."""
        return self._engine.info

    @property
    def default_params(self) -> SamplingParams:
        """Used where none are given: the checkpoint's defaults of sampling, else SamplingParams()."""
        return SamplingParams(**self.info.sampling_defaults.values())  # type: ignore[arg-type]

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params = None,
        *,
        n: int = 1,
        predictions: Sequence[str] | None = None,
        adapter: str = "",
        progress: bool = True,
    ) -> list[GenerationResult]:
        """Complete prompts, all batched together.

        Args:
            prompts: one text or many, each a string or token ids.
            params: for all prompts, or one for each; None is `default_params`.
            n: outputs per prompt.
            predictions: what each output is expected to be; seeds the drafts, never changes the output.
            adapter: name of the adapter to decode with; "" is the base model alone.
            progress: show a progress bar.

        Returns:
            One result per prompt, in order.

        Raises:
            RequestError: a prompt or a parameter is at fault; nothing is decoded then.
        """
        codec = self._tools_of(adapter).codec
        texts = _as_list(prompts)
        if predictions is not None and len(predictions) != len(texts):
            raise InvalidRequest(f"{len(predictions)} predictions for {len(texts)} prompts: pass one for each")
        jobs = [
            _Job(
                prompt_ids=tuple(codec.encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else prompt),
                prediction_ids=tuple(codec.encode(expected, add_special_tokens=False)),
                continues_text=True,
                adapter=adapter,
            )
            for prompt, expected in zip(texts, predictions or [""] * len(texts), strict=True)
        ]
        return self._run(jobs, self._params_of_each(params, len(jobs)), n=n, progress=progress)

    def chat(
        self,
        conversations: Sequence[Message] | Sequence[Sequence[Message]],
        params: Params = None,
        *,
        n: int = 1,
        adapter: str = "",
        progress: bool = True,
    ) -> list[GenerationResult]:
        """Answer conversations through the model's chat template, all batched together.

        What a model thinks before it answers is told from the text; a grammar binds what comes behind it.

        Args:
            conversations: one conversation or many; a conversation is a sequence of {"role": ..., "content": ...}.
            params, n, adapter, progress: as in `generate`.

        Raises:
            InvalidRequest: the model has no chat template, or the template refuses the messages.
        """
        jobs = [self._chat_job(messages, adapter) for messages in _as_conversations(conversations)]
        return self._run(jobs, self._params_of_each(params, len(jobs)), n=n, progress=progress)

    def stream_chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, *, adapter: str = ""
    ) -> Iterator[tuple[TextDelta, DecodingStats]]:
        """Answer one conversation, yielding text as it is accepted. Closing the iterator aborts the request."""
        job = self._chat_job(messages, adapter)
        request = self._new_request(job, params or self.default_params)
        text = self._new_text(job, request.params)
        for output in self._decode([request]):
            if output.finish_reason == "error":
                raise EngineFailed(output.error or "the engine failed at the output")
            yield text.push(output), output.stats
            if text.finished:
                return

    def _run(
        self, jobs: Sequence["_Job"], params: Sequence[SamplingParams], *, n: int, progress: bool
    ) -> list[GenerationResult]:
        if n < 1:
            raise InvalidRequest(f"n={n}: must be >= 1", param="n")
        requests, collected = [], {}
        for job, own in zip(jobs, params, strict=True):
            for index in range(n):
                request = self._new_request(job, own, choice_index=index)
                requests.append(request)
                collected[request.request_id] = _Collected(self._new_text(job, own))
        with tqdm(total=len(requests), disable=not progress, unit="output", dynamic_ncols=True) as bar:
            totals = _Totals()
            for output in self._decode(requests):
                one = collected[output.request_id]
                if one.text.finished:
                    continue
                totals.add(output)
                if one.push(output):
                    self._engine.abort(output.request_id)
                    bar.set_postfix_str(f"{totals.num_tokens} tokens, TPF {totals.tokens_per_forward:.2f}")
                    bar.update()
        outputs = [collected[request.request_id].finish() for request in requests]
        return [
            GenerationResult(prompt_ids=job.prompt_ids, outputs=tuple(outputs[index * n : (index + 1) * n]))
            for index, job in enumerate(jobs)
        ]

    def _decode(self, requests: Sequence[NewRequest]) -> Iterator[RequestOutput]:
        """Outputs of these requests until all have ended; leaving early aborts the rest."""
        try:
            for request in requests:
                self._engine.add_request(request)
            while self._engine.has_work():
                yield from self._engine.step()
        finally:
            for request in requests:
                self._engine.abort(request.request_id)
            while self._engine.has_work():
                self._engine.step()

    def _tools_of(self, adapter: str) -> "_TextTools":
        if adapter not in self._tools:
            known = ", ".join(name for name in self._tools if name) or "none"
            raise InvalidRequest(f"adapter={adapter!r}: is not loaded; loaded are: {known}", param="adapter")
        return self._tools[adapter]

    def _params_of_each(self, params: Params, num_prompts: int) -> list[SamplingParams]:
        """The sampling parameters of each prompt; InvalidRequest where they are of another type or number."""
        if params is None or isinstance(params, SamplingParams):
            return [params or self.default_params] * num_prompts
        if not isinstance(params, Sequence) or not all(isinstance(own, SamplingParams) for own in params):
            raise InvalidRequest(
                f"params={params!r}: must be SamplingParams, or a list with one for each prompt", param="params"
            )
        if len(params) != num_prompts:
            raise InvalidRequest(
                f"{len(params)} params for {num_prompts} prompts: pass one for all or one for each", param="params"
            )
        return list(params)

    def _chat_job(self, messages: Sequence[Message], adapter: str) -> "_Job":
        tools = self._tools_of(adapter)
        if tools.template is None:
            name = adapter or self.info.name
            raise InvalidRequest(
                f"{name} has no chat template: use generate(), or load it with chat_template=", param="messages"
            )
        prompt = tools.template.render(messages)
        ids = tuple(tools.codec.encode_chat(prompt, param="messages"))
        return _Job(prompt_ids=ids, adapter=adapter, expected=tools.dialect.answer_to(prompt.text))

    def _new_text(self, job: "_Job", params: SamplingParams) -> OutputText:
        codec = self._tools_of(job.adapter).codec
        syntax = None if job.expected is None else job.expected.syntax()
        return OutputText(codec, stop=params.stop, continues_text=job.continues_text, syntax=syntax)

    def _new_request(self, job: "_Job", params: SamplingParams, choice_index: int = 0) -> NewRequest:
        if job.expected is not None and params.grammar is not None:
            params = msgspec.structs.replace(params, grammar=job.expected.grammar(None, params.grammar))
        return NewRequest(
            request_id=str(next(self._request_numbers)),
            prompt_ids=job.prompt_ids,
            params=params,
            choice_index=choice_index,
            prediction_ids=job.prediction_ids,
            adapter=job.adapter,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """A prompt on its way to a request."""

    prompt_ids: tuple[int, ...]
    prediction_ids: tuple[int, ...] = ()
    continues_text: bool = False
    adapter: str = ""
    expected: ExpectedAnswer | None = None  # of a conversation


@dataclass(frozen=True, slots=True)
class _TextTools:
    """What turns texts and conversations into tokens and back."""

    codec: TextCodec
    template: ChatTemplate | None
    dialect: Dialect

    @classmethod
    def of(
        cls, bundle: TokenizerBundle, end_ids: Sequence[int], reasoning_format: ReasoningFormatChoice
    ) -> "_TextTools":
        codec, template = TextCodec(bundle), ChatTemplate.of(bundle)
        dialect = find_dialect(template, codec, reasoning_format=reasoning_format, end_ids=end_ids)
        return cls(codec, template, dialect)


@dataclass(slots=True)
class _Collected:
    """An output that grows."""

    text: OutputText
    pieces: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PlacedLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    stats: DecodingStats | None = None
    error: str | None = None

    def push(self, output: RequestOutput) -> bool:
        """Append; True where this ended the output."""
        delta = self.text.push(output)
        self.pieces.append(delta.text)
        self.reasoning.append(delta.reasoning)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.prompt_logprobs = output.prompt_logprobs or self.prompt_logprobs
        self.stats, self.error = output.stats, output.error
        return delta.finish_reason is not None

    def finish(self) -> GeneratedOutput:
        if self.stats is None or self.text.finish_reason is None:
            raise EngineFailed("an output did not finish; the engine stopped without saying so")
        return GeneratedOutput(
            text="".join(self.pieces),
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs),
            prompt_logprobs=self.prompt_logprobs,
            finish_reason=self.text.finish_reason,
            stats=self.stats,
            reasoning="".join(self.reasoning),
            error=self.error,
        )


@dataclass(slots=True)
class _Totals:
    """Tokens and forward passes over all outputs, for the progress bar."""

    num_tokens: int = 0
    num_forward_passes: int = 0

    def add(self, output: RequestOutput) -> None:
        self.num_tokens += len(output.token_ids)
        self.num_forward_passes += 1 if output.token_ids else 0

    @property
    def tokens_per_forward(self) -> float:
        return self.num_tokens / self.num_forward_passes if self.num_forward_passes else 0.0


def _text_tools(info: ModelInfo, reasoning_format: ReasoningFormatChoice) -> dict[str, _TextTools]:
    """Of the base, "", and of each adapter by its name."""
    base = _TextTools.of(info.tokenizer, info.eos_token_ids, reasoning_format)
    own = {
        adapter.name: base
        if adapter.tokenizer is None
        else _TextTools.of(adapter.tokenizer, adapter.eos_token_ids, reasoning_format)
        for adapter in info.adapters
    }
    return {"": base, **own}


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt, as text or as token ids, or many: always a list."""
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _as_conversations(conversations: Sequence[Message] | Sequence[Sequence[Message]]) -> list[Sequence[Message]]:
    if conversations and isinstance(conversations[0], Mapping):
        return [conversations]  # type: ignore[list-item]
    return list(conversations)  # type: ignore[arg-type]
