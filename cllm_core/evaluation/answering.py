"""A loaded model that answers examples: messages to prompts, outputs to records."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import msgspec

from cllm_core.config import EngineConfig
from cllm_core.engine.build import build_engine
from cllm_core.engine.engine import Engine
from cllm_core.errors import ConfigError, PromptTooLong
from cllm_core.evaluation.decode import Decoded, Prompt, decode
from cllm_core.evaluation.records import Answer
from cllm_core.evaluation.report import ModelDescription
from cllm_core.evaluation.tasks import Example, Task
from cllm_core.evaluation.trajectory import count_fast_forwarded, count_stationary, repetition_rate
from cllm_core.info import TokenizerBundle
from cllm_core.models.progress import OnProgress
from cllm_core.text.chat_template import ChatTemplate
from cllm_core.text.codec import TextCodec
from cllm_core.text.prefixes import shared_prefix_length

_WARM_UP_TOKENS = 8


class ChatCodec:
    """A model's tokenizer with its chat template.

    Raises:
        ConfigError: the model has no chat template.
    """

    def __init__(self, bundle: TokenizerBundle, model_name: str) -> None:
        template = ChatTemplate.of(bundle)
        if template is None:
            raise ConfigError(f"{model_name} has no chat template, which the prompts are written with; add one to it")
        self.text = TextCodec(bundle)
        self._template = template

    def prompt_ids(self, message: str) -> tuple[int, ...]:
        """Tokens of a conversation that opens with this message of the user, up to the answer."""
        return tuple(self.text.encode_chat(self._template.render([{"role": "user", "content": message}])))


class AnsweringModel:
    """An engine and its tokenizer.

    Nothing adapts while it is measured, unless `is_adaptive`: every window is the block length, and every repeat
    computes the whole prompt, or the same part of it.

    Args:
        role: of the model in the evaluation.
        config: what to load.
        on_progress: called with (stage, fraction) while it loads.
        prefix_caching: let `decode_behind` find in the cache what comes before.
        is_adaptive: choose window lengths as the settings say.
    """

    def __init__(
        self,
        role: str,
        config: EngineConfig,
        on_progress: OnProgress,
        *,
        prefix_caching: bool = False,
        is_adaptive: bool = False,
    ) -> None:
        self.role = role
        self._adapter = config.adapter
        self._max_batched_tokens = config.max_batched_tokens
        self._num_salts = 0
        adaptive = is_adaptive and config.adaptive_block_length
        fixed = msgspec.structs.replace(config, prefix_caching=prefix_caching, adaptive_block_length=adaptive)
        self._engine = build_engine(fixed, on_progress)
        self.info = self._engine.info
        self.codec = ChatCodec(self.info.tokenizer, self.info.name)

    @property
    def engine(self) -> Engine:
        """The engine underneath."""
        return self._engine

    def describe(self) -> ModelDescription:
        """For the report."""
        return ModelDescription(
            role=self.role,
            name=self.info.name,
            adapter=self._adapter,
            num_parameters=self.info.num_parameters,
            device=self.info.device,
            dtype=self.info.number_format,
            domain=self.info.domain,
        )

    def prompt(self, example: Example, max_tokens: int) -> Prompt:
        """The example as tokens, its answer cut to what the context leaves.

        Raises:
            PromptTooLong: the context leaves nothing.
        """
        ids = self.codec.prompt_ids(example.message)
        room = self.info.max_model_len - len(ids)
        if room < 1:
            raise PromptTooLong(
                f"example {example.example_id}: its {len(ids)} prompt tokens leave no room in the context of "
                f"{self.info.max_model_len} tokens; raise max_model_len or leave the example out"
            )
        return Prompt(ids, min(max_tokens, room))

    def warm_up(self, prompt: Prompt, block_lengths: Sequence[int]) -> None:
        """Decode a little at every block length, so that one-time costs fall on no measurement."""
        short = Prompt(prompt.token_ids, min(prompt.max_tokens, _WARM_UP_TOKENS))
        for block_length in block_lengths:
            decode(self._engine, [short], block_length=block_length)

    def num_together(self, prompts: Sequence[Prompt], block_length: int) -> int:
        """How many of these prompts, at least one, can be decoded together without a window cut for want of room.

        Half of a step's tokens do for the windows, since the other half is kept for prompts that are being read.
        """
        longest = max(len(prompt.token_ids) + prompt.max_tokens for prompt in prompts)
        num_blocks = -(-longest // self.info.cache_block_size)
        num_windows = self._max_batched_tokens // (2 * block_length)
        return max(1, min(self.info.max_num_seqs, num_windows, self.info.num_cache_blocks // num_blocks))

    def decode(self, prompts: Sequence[Prompt], block_length: int) -> list[Decoded]:
        """Greedy outputs, all decoded together; none finds what an earlier call decoded."""
        return decode(self._engine, prompts, block_length=block_length, cache_salt=self._new_salt())

    def decode_behind(self, num_cached: int, prompt: Prompt, block_length: int) -> Decoded:
        """The output for one prompt whose first tokens, as far as they fill blocks of the cache, were computed before.

        Args:
            num_cached: of these tokens; 0 computes the whole prompt.
            prompt: longer than that.
            block_length: n.
        """
        salt = self._new_salt()
        if num_cached:
            decode(self._engine, [Prompt(prompt.token_ids[:num_cached], 1)], block_length=1, cache_salt=salt)
        return decode(self._engine, [prompt], block_length=block_length, cache_salt=salt)[0]

    def _new_salt(self) -> str:
        """With it nothing of an earlier request is found."""
        self._num_salts += 1
        return f"{self.role} {self._num_salts}"

    def answer(self, task: Task, example: Example, block_length: int, output: Decoded) -> Answer:
        """The record of an answer, scored, without times."""
        trajectory = output.trajectory
        text = self.codec.text.decode(output.token_ids)
        return Answer(
            model=self.role,
            block_length=block_length,
            example=example.example_id,
            text=text,
            token_ids=output.token_ids,
            finish_reason=output.finish_reason,
            num_passes=len(trajectory.iterations),
            num_prefill_passes=trajectory.num_prefill_passes,
            num_prefill_tokens=trajectory.num_prefill_tokens,
            num_fast_forwarded=count_fast_forwarded(trajectory),
            num_stationary=count_stationary(trajectory),
            repetition=repetition_rate(output.token_ids),
            scores=dict(task.score(example.example_id, text)),
        )


def shared_lengths(prompts: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """How many tokens each prompt begins with that another one begins with, too, at most all but its last."""
    order = sorted(prompts, key=lambda name: prompts[name])  # nobody begins more alike than a neighbour
    lengths = dict.fromkeys(prompts, 0)
    for first, second in pairwise(order):
        common = shared_prefix_length([prompts[first], prompts[second]])
        lengths[first], lengths[second] = max(lengths[first], common), max(lengths[second], common)
    return lengths


def with_times(answer: Answer, outputs: Sequence[Decoded]) -> Answer:
    """The answer with the wall-clock times of its repeats."""
    return msgspec.structs.replace(
        answer,
        seconds=tuple(output.seconds for output in outputs),
        first_seconds=tuple(output.first_seconds for output in outputs),
    )
