"""Marks: tokens that structure an output, told from ordinary text that is spelled like them.

In a text for a reader MARK stands before each token that is one; nothing else can put it there.
"""

import re
from collections.abc import Collection

MARK = "\ud800"
"""Half of a surrogate pair, which no decoded text holds."""


def with_marks(text: str, marks: Collection[str]) -> str:
    """A fixed string of a format as a reader finds it where these of its parts are tokens."""
    if not marks:
        return text
    return re.sub("|".join(map(re.escape, sorted(marks, key=len, reverse=True))), lambda found: MARK + found[0], text)


def without_marks(text: str) -> str:
    """The text as it is spelled."""
    return text.replace(MARK, "")


def num_held(text: str, tag: str) -> int:
    """Characters at the end of a text that may be the beginning of a tag."""
    longest = min(len(tag) - 1, len(text))
    return next((size for size in range(longest, 0, -1) if text.endswith(tag[:size])), 0)
