"""Every error this project raises on purpose, as one tree.

    CllmError
    |-- ConfigError             a setting is wrong; raised where the setting object is built
    |-- ModelLoadError          a checkpoint, adapter or tokenizer cannot be loaded
    |-- DataError               a data file cannot be used; names file, line and remedy
    |-- RequestError            the client's fault; carries the name of the offending field
    |   |-- InvalidRequest          a value is out of range or malformed
    |   |-- UnsupportedParameter    a known field that this server does not implement
    |   |-- PromptTooLong           prompt and requested output do not fit the context
    |   `-- PromptCrashedWorker     the prompt was running in several crashes of the worker
    |-- EngineBusy              the queue is full; trying again later may succeed
    |-- EngineUnavailable       no worker is ready: starting, restarting or draining
    |-- EngineFailed            the worker died or failed while it held the request
    |-- RequestTimeout          the request took longer than the server lets one take
    |   |-- FirstTokenTimeout       to its first token
    |   `-- QueueTimeout            in the queue; trying again later may succeed
    `-- BlockPoolCorrupted      an internal invariant of the KV cache does not hold

The server maps these types to HTTP in one table (`server.http.errors`).
"""


class CllmError(Exception):
    """Base of all errors of this project."""


class ConfigError(CllmError, ValueError):
    """A setting is wrong. The message names the field, its value and the remedy."""


class ModelLoadError(CllmError):
    """A checkpoint, adapter or tokenizer cannot be loaded. The message names the source and the remedy."""


class DataError(CllmError, ValueError):
    """A data file is missing, broken or does not fit its use. The message names the file, the place and the remedy."""


class RequestError(CllmError, ValueError):
    """The request is at fault.

    Attributes:
        param: name of the offending request field, None where no single field is at fault.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidRequest(RequestError):
    """A request value is out of range or malformed."""


class UnsupportedParameter(RequestError):
    """A documented request field that this server does not implement."""


class PromptTooLong(RequestError):
    """Prompt and requested output do not fit the model's context."""


class PromptCrashedWorker(RequestError):
    """The prompt was running in several crashes of the worker; it is not tried again."""


class EngineBusy(CllmError):
    """The queue is full.

    Attributes:
        retry_after: seconds after which a retry is sensible.
    """

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineUnavailable(CllmError):
    """No worker is ready: it is starting, restarting or draining."""


class EngineFailed(CllmError):
    """The worker died or failed while it held the request."""


class RequestTimeout(CllmError):
    """The request took longer than the server lets one take (request_timeout)."""


class FirstTokenTimeout(RequestTimeout):
    """The first token took longer than that (ttft_timeout)."""


class QueueTimeout(RequestTimeout):
    """The request waited in the queue for longer than that (queue_timeout)."""


class BlockPoolCorrupted(CllmError):
    """An internal invariant of the KV cache does not hold; a bug of this project."""


def describe_error(error: Exception) -> str:
    """An error for clients: the message of our own ones, else only the type, since the text is for the log."""
    return str(error) if isinstance(error, CllmError) else f"an internal error ({type(error).__name__}; see the log)"
