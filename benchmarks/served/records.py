"""What the parts of the comparison tell each other: the load to be made, and each request as its client saw it.

The load runs in a process of its own, so these are written as JSON.
"""

import msgspec

from cllm_core.errors import CllmError


class BenchmarkError(CllmError):
    """A server or the load tool does not do what the comparison needs. The message says what, and where its log is."""


class LoadJob(msgspec.Struct, frozen=True, kw_only=True):
    """One load on one server.

    Attributes:
        url: base of the API, without /v1.
        model: name that the server wants in requests.
        prompts: user's messages, each sent once.
        concurrency: requests in flight, as long as there are prompts.
        max_tokens: of an answer.
        stream_options: of every request.
        timeout: of a silent connection, in seconds.
    """

    url: str
    model: str
    prompts: list[str]
    concurrency: int
    max_tokens: int
    stream_options: dict[str, bool]
    timeout: float = 300.0


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """One request as its client saw it; times in seconds on one clock for the whole load.

    Attributes:
        prompt: index of it in the job.
        started: when the request was sent.
        first, last: when the first and the last piece of text arrived; None where none did.
        finished: when the stream ended.
        text: all of it.
        first_text: its first piece, which may be of several tokens; "" where none came.
        finish_reason: as the server put it.
        num_tokens: of the answer, as the server counts; None where it does not tell.
        num_forward_passes: of the answer, where the server tells.
        error: what went wrong, None for an answer that is whole.
    """

    prompt: int
    started: float
    finished: float
    first: float | None = None
    last: float | None = None
    text: str = ""
    first_text: str = ""
    finish_reason: str | None = None
    num_tokens: int | None = None
    num_forward_passes: int | None = None
    error: str | None = None
