"""What prompts begin with together."""

from collections.abc import Sequence


def shared_prefix_length(prompts: Sequence[tuple[int, ...]]) -> int:
    """Tokens that all prompts begin with; the last token of a prompt is never shared, as it predicts the answer."""
    first, last = min(prompts), max(prompts)  # in lexical order these two differ the earliest
    limit = min(len(prompt) for prompt in prompts) - 1
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b or i >= limit), limit)
