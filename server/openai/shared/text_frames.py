"""TextFrames: JSON of stream chunks that bring nothing but text, which most do, shaped once and filled in after that.

Building each chunk with pydantic cost more than anything else of a step. The schema stays the only place that
says how a chunk looks.
"""

import uuid
from collections.abc import Callable

from pydantic import BaseModel
from pydantic_core import to_json

from ...generation.choices import ChoiceDelta

# Stands where the text belongs while a frame is made; like no other text in a chunk.
_MARK = uuid.uuid4().hex


class TextFrames:
    """The frames of one answer, one for each choice.

    Args:
        shape: makes the chunk of a delta that brings only text; two chunks of a choice must differ in their text alone.
    """

    def __init__(self, shape: Callable[[ChoiceDelta], BaseModel]) -> None:
        self._shape = shape
        self._frames: dict[int, tuple[bytes, bytes]] = {}

    def chunk(self, delta: ChoiceDelta) -> bytes:
        """JSON of the chunk."""
        if delta.index not in self._frames:
            self._frames[delta.index] = self._frame(delta)
        before, after = self._frames[delta.index]
        return before + to_json(delta.text) + after

    def _frame(self, delta: ChoiceDelta) -> tuple[bytes, bytes]:
        before, after = as_json(self._shape(delta.with_text(_MARK))).split(to_json(_MARK))
        return before, after


def as_json(body: BaseModel) -> bytes:
    """JSON of a body, without the fields that were not set."""
    return body.model_dump_json(exclude_unset=True).encode()
