"""Server-sent events on the wire."""


def encode_event(data: bytes, *, name: str | None = None) -> bytes:
    """A server-sent event; its data, such as JSON, holds no line breaks."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + data + b"\n\n"
