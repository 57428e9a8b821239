"""Reading a streamed chat completion, line by line. Servers differ in where they put the usage; all are understood."""

import msgspec

_DATA = b"data:"
_END = b"[DONE]"


class Decoding(msgspec.Struct, frozen=True):
    """How this project's server decoded the answer."""

    forward_passes: int


class Usage(msgspec.Struct, frozen=True):
    """Counts of the whole request; `decoding` comes from this project's server only."""

    completion_tokens: int
    decoding: Decoding | None = None


class Delta(msgspec.Struct, frozen=True):
    """The next piece of text."""

    content: str | None = None


class Choice(msgspec.Struct, frozen=True):
    """The one choice of a chunk."""

    delta: Delta = Delta()
    finish_reason: str | None = None


class Chunk(msgspec.Struct, frozen=True):
    """One event of the stream, as far as it is of use here."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: object = None

    @property
    def text(self) -> str:
        """What the chunk adds to the answer."""
        return "".join(choice.delta.content or "" for choice in self.choices)

    @property
    def finish_reason(self) -> str | None:
        """Why the answer ended, None where it goes on."""
        return next((choice.finish_reason for choice in self.choices if choice.finish_reason), None)


def read_line(line: bytes) -> Chunk | None:
    """The event that a line of the stream carries; None for comments, names, empty lines and the end mark.

    Raises:
        msgspec.DecodeError: the line is no event of a chat completion.
    """
    if not line.startswith(_DATA):
        return None
    data = line.removeprefix(_DATA).strip()
    return None if data == _END else msgspec.json.decode(data, type=Chunk)
