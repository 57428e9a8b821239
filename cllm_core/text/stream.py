"""The text of one output, step by step: detokenisation, reasoning, calls, stop strings, usage and the tokens' places.

Tokens are taken one by one whatever a step brought, so an output ends on the same token and character with Jacobi
decoding as with AR. Used by the server, streaming or not, and by the offline API.
"""

from collections import deque
from collections.abc import Sequence
from itertools import takewhile

import msgspec

from cllm_core.request import FinishReason, RequestOutput, TokenLogprobs
from cllm_core.text.codec import TextCodec
from cllm_core.text.expected_answer import OutputSyntax
from cllm_core.text.marks import MARK
from cllm_core.text.output import ReadOutput
from cllm_core.text.stop import StopMatcher
from cllm_core.text.tools.reader import CallDelta, merge_deltas


class PlacedLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities of one token and its place.

    Attributes:
        token_id: the token that was accepted.
        text_offset: characters of the output's text before the token's first.
    """

    token_id: int
    text_offset: int
    logprobs: TokenLogprobs


class TextDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What one step added to an output.

    Attributes:
        reasoning: characters of what the model thinks before its text.
        text: characters that are final; may be empty while a character or a stop string is incomplete.
        calls: what is new of calls of functions, which come behind the text.
        token_ids: tokens that were generated for this output, with a stop token and the tokens of a stop string, but
            without those that the step accepted beyond a stop string. They are what usage counts.
        logprobs: of the tokens whose text has been given, so they may come a step later than the token; without a stop
            token and the tokens of a stop string, of reasoning and of calls. Empty where the request asked for none.
        finish_reason: set in the last delta; "stop" also where a stop string ended the text.
        draft: what may follow the text given so far: text held back for a stop string, then the engine's unaccepted
            predictions up to a call. It replaces the draft before, and is empty where the engine reported none.
    """

    reasoning: str = ""
    text: str = ""
    calls: tuple[CallDelta, ...] = ()
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[PlacedLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    draft: str = ""


class OutputText:
    """Turns the RequestOutputs of one request into its text.

    A stop string can end the text before the engine ends the request: `finished` is then true after a delta with
    finish_reason "stop" and the caller aborts the request. Outputs that still arrive yield empty deltas.
    """

    def __init__(
        self,
        codec: TextCodec,
        *,
        stop: tuple[str, ...] = (),
        continues_text: bool = False,
        syntax: OutputSyntax | None = None,
    ) -> None:
        """Start an empty text.

        Args:
            stop: as in SamplingParams; they end text, and do nothing within reasoning and calls.
            continues_text: the text goes on where the prompt ends (completions), so a leading space is kept.
            syntax: how reasoning and calls of functions look; None reads neither.
        """
        self._reader = None if syntax is None else syntax.reader()
        self._marks = {} if syntax is None else syntax.marks
        spelled = None if syntax is None else {**syntax.spelled, **syntax.marks}
        self._detokenizer = codec.detokenizer(continues_text=continues_text, spelled=spelled)
        self._stop = StopMatcher(stop)
        self._holds_nothing_back = syntax is None and not stop
        self._waiting: deque[PlacedLogprobs] = deque()  # of tokens whose text has not been given yet
        self._finish_reason: FinishReason | None = None
        self._num_tokens = 0
        self._num_reasoning_tokens = 0
        # Of the last tokens it may not be known yet whether they begin reasoning.
        self._num_undecided = 0
        self._undecided: list[PlacedLogprobs] = []
        self._num_detokenized = 0  # characters, those held back for a stop string included
        self._num_given = 0  # characters

    @property
    def finished(self) -> bool:
        """Whether the last delta was given."""
        return self._finish_reason is not None

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the output ended, None while it goes on."""
        return self._finish_reason

    @property
    def matched_stop(self) -> str | None:
        """The stop string that ended the text, None where none did."""
        return self._stop.matched

    @property
    def num_tokens(self) -> int:
        """Tokens generated for this output so far: the completion tokens of the usage report."""
        return self._num_tokens

    @property
    def num_reasoning_tokens(self) -> int:
        """Those of them that were reasoning, its tags included."""
        return self._num_reasoning_tokens

    def push(self, output: RequestOutput) -> TextDelta:
        """Take what a step brought and return what it adds; exactly one delta has a finish_reason, the last."""
        if self.finished:
            return TextDelta()
        num_text_tokens = len(output.token_ids) - (output.stop_token_id is not None)
        read, num_consumed = self._push_tokens(output.token_ids[:num_text_tokens], output.logprobs)
        if not self._stop.finished and output.finish_reason is not None:
            read = read.followed_by(self._flush())
        if self._stop.finished:
            return self._delta(read, output.token_ids[:num_consumed], "stop")
        return self._delta(read, output.token_ids, output.finish_reason, draft=self._draft(output))

    def _push_tokens(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] | None
    ) -> tuple[ReadOutput, int]:
        """What is safe to give, and the number of tokens up to the one that completes a stop string."""
        if self._holds_nothing_back and logprobs is None:
            # The same text as one by one, for less.
            text = self._detokenizer.push(token_ids)
            self._num_detokenized += len(text)
            return ReadOutput(content=text), len(token_ids)
        reasoning: list[str] = []
        safe: list[str] = []
        calls: list[CallDelta] = []
        for index, token_id in enumerate(token_ids):
            entry = None if logprobs is None else logprobs[index]
            read = self._read_token(token_id, entry)
            reasoning.append(read.reasoning)
            safe.append(self._stop.push(read.content))
            if self._stop.finished:
                return ReadOutput(reasoning="".join(reasoning), content="".join(safe)), index + 1
            if self._is_calling:
                safe.append(self._stop.flush())
            calls += read.calls
        read = ReadOutput(reasoning="".join(reasoning), content="".join(safe), calls=merge_deltas(calls))
        return read, len(token_ids)

    def _read_token(self, token_id: int, logprobs: TokenLogprobs | None) -> ReadOutput:
        text = self._detokenizer.push((token_id,))
        if self._reader is None:
            if logprobs is not None:
                self._waiting.append(PlacedLogprobs(token_id, self._num_detokenized, logprobs))
            self._num_detokenized += len(text)
            return ReadOutput(content=text)
        was_reasoning, num_before = self._reader.is_reasoning, self._reader.num_content
        mark = self._marks.get(token_id)
        read = self._reader.push(text if mark is None else text.removesuffix(mark) + MARK + mark)
        if logprobs is not None and (not text or self._reader.num_content > num_before):
            self._undecided.append(PlacedLogprobs(token_id, num_before, logprobs))
        self._num_undecided += 1
        if was_reasoning or not self._reader.is_undecided:
            self._decide(is_reasoning=was_reasoning or self._reader.is_reasoning)
        return read

    def _decide(self, *, is_reasoning: bool) -> None:
        """Book the last tokens as reasoning or as anything else."""
        if is_reasoning:
            self._num_reasoning_tokens += self._num_undecided
        else:
            self._waiting += self._undecided
        self._undecided.clear()
        self._num_undecided = 0

    @property
    def _is_calling(self) -> bool:
        return self._reader is not None and self._reader.is_calling

    def _flush(self) -> ReadOutput:
        """What was held back to the end; a stop string may end with the text."""
        self._decide(is_reasoning=False)
        held = ReadOutput() if self._reader is None else self._reader.flush()
        text = self._stop.push(held.content) + self._stop.flush()
        return ReadOutput(reasoning=held.reasoning, content=text, calls=held.calls)

    def _draft(self, output: RequestOutput) -> str:
        if not output.draft_ids:
            return ""
        if self._reader is None:
            return self._stop.held + self._detokenizer.peek(output.draft_ids)
        # What a mark would begin cannot be told from its letters.
        draft_ids = list(takewhile(lambda token_id: token_id not in self._marks, output.draft_ids))
        return self._stop.held + self._reader.peek(self._detokenizer.peek(draft_ids))

    def _delta(
        self,
        read: ReadOutput,
        token_ids: tuple[int, ...],
        finish_reason: FinishReason | None,
        *,
        draft: str = "",
    ) -> TextDelta:
        self._num_given += len(read.content)
        self._num_tokens += len(token_ids)
        self._finish_reason = finish_reason
        return TextDelta(
            reasoning=read.reasoning,
            text=read.content,
            calls=read.calls,
            token_ids=token_ids,
            logprobs=tuple(self._take_logprobs()),
            finish_reason=finish_reason,
            draft=draft,
        )

    def _take_logprobs(self) -> list[PlacedLogprobs]:
        """Entries whose text begins in what was given; at an end of neither stop string nor calls all that wait."""
        is_whole = self.finished and not self._stop.finished and not self._is_calling
        taken = []
        while self._waiting and (is_whole or self._waiting[0].text_offset < self._num_given):
            taken.append(self._waiting.popleft())
        return taken
