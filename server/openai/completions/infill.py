"""Prompts for filling in the middle (`suffix`), for tokenizers that have tokens for it.

All of these families are trained on the order prefix, suffix, middle (PSM, arXiv:2207.14255).
"""

from cllm_core.errors import UnsupportedParameter
from cllm_core.text.codec import TextCodec

# Before the prefix, before the suffix, before the middle.
_MARKERS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
)


def infill_prompt(prefix: str, suffix: str, codec: TextCodec) -> str:
    """The prompt after which the model writes what belongs between the two texts.

    Raises:
        UnsupportedParameter: the tokenizer has no tokens for this.
    """
    for markers in _MARKERS:
        if all(codec.has_token(marker) for marker in markers):
            before_prefix, before_suffix, before_middle = markers
            return f"{before_prefix}{prefix}{before_suffix}{suffix}{before_middle}"
    raise UnsupportedParameter(
        "suffix: the tokenizer of this model has no fill-in-the-middle tokens; leave it out", param="suffix"
    )
