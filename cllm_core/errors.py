"""Every error this project raises on purpose, as one tree.

    CllmError
    |-- ConfigError             a setting is wrong; raised where the setting object is built
    |-- ModelLoadError          a checkpoint, adapter or tokenizer cannot be loaded
    |-- DataError               a data file cannot be used; names file, line and remedy
    |-- RequestError            the client's fault; carries the name of the offending field
    |   |-- InvalidRequest          a value is out of range or malformed
    |   |-- UnsupportedParameter    a known field that this server does not implement
    |   `-- PromptTooLong           prompt and requested output do not fit the context
    |-- EngineBusy              the queue is full; trying again later may succeed
    |-- EngineUnavailable       no worker is ready: starting, restarting or draining
    |-- EngineFailed            the worker died or failed while it held the request
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


class BlockPoolCorrupted(CllmError):
    """An internal invariant of the KV cache does not hold; a bug of this project."""
