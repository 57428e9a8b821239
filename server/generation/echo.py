"""Prompts that an answer repeats with their log-probabilities (`echo` and `logprobs` of completions).

Evaluation harnesses read the likelihood of given texts off these, so the entries are complete: one for every token of
prompt and output, one that ended the output included.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from cllm_core.request import TokenLogprobs
from cllm_core.text.codec import TextCodec
from cllm_core.text.stream import PlacedLogprobs


@dataclass(frozen=True, slots=True)
class ScoredPrompt:
    """The tokens of a prompt, where they stand in the answer's text, and their log-probabilities.

    Attributes:
        text_offsets: characters of the text before each token's first.
        logprobs: of the tokens from the second on; the first follows nothing.
    """

    token_ids: tuple[int, ...]
    text_offsets: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]


def score_prompt(
    prompt_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], codec: TextCodec, *, echo: str
) -> ScoredPrompt:
    """Place the tokens of a prompt in the text `echo` that was made of them, or they of it."""
    detokenizer = codec.detokenizer()
    offsets: list[int] = []
    num_chars = 0
    for token_id in prompt_ids:
        offsets.append(min(num_chars, len(echo)))
        num_chars += len(detokenizer.push((token_id,)))
    return ScoredPrompt(tuple(prompt_ids), tuple(offsets), tuple(logprobs))


def place_output(
    entries: Sequence[PlacedLogprobs],
    logprobs: Sequence[TokenLogprobs] | None,
    stop_token_id: int | None,
    *,
    num_echoed: int,
    num_chars: int,
) -> tuple[PlacedLogprobs, ...]:
    """Entries of a step's output behind an echo, and one for the token that ended the output.

    Args:
        entries: placed in the output's own text.
        logprobs: of all tokens of the step.
        stop_token_id: the last of them where it ended the output, else None.
        num_echoed: characters of the echo.
        num_chars: characters of echo and output so far.
    """
    placed = [msgspec.structs.replace(entry, text_offset=entry.text_offset + num_echoed) for entry in entries]
    if stop_token_id is not None and logprobs:
        placed.append(PlacedLogprobs(stop_token_id, num_chars, logprobs[-1]))
    return tuple(placed)
