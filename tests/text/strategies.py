"""Random inputs for the laws of this layer."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

from hypothesis import strategies as st

Sliceable = TypeVar("Sliceable", str, tuple[int, ...])


def cuts(max_length: int) -> st.SearchStrategy[list[int]]:
    """Where to cut a sequence into pieces."""
    return st.lists(st.integers(0, max_length), max_size=12)


def cut(whole: Sliceable, at: Sequence[int]) -> list[Sliceable]:
    """The pieces of a sequence, some of them empty."""
    borders = sorted({0, len(whole), *(min(place, len(whole)) for place in at)})
    return [whole[start:end] for start, end in pairwise(borders)]
