"""What of a request has no effect: fields that nobody knows, and values that cannot be honoured but change no answer.

Whoever drops such a field calls `ignore_field`. What the settings make of it (`--unknown-fields`) is decided here: the
middleware reports it in a response header, a metric and the log, or the request is refused.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal

import structlog

from cllm_core.errors import UnsupportedParameter

UnknownFields = Literal["warn", "ignore", "refuse"]

IGNORED_FIELDS_HEADER = "X-Ignored-Fields"

OTHER = "other"
"""Label of all fields that no table knows: clients could make up any number of names."""

# Of one request, so that a hostile body cannot fill headers.
_MAX_NAMES = 20
_MAX_NAME_CHARS = 64
# Of all requests together: each is logged once.
_MAX_LOGGED = 256

_UNSAFE = re.compile(r"[^A-Za-z0-9_.$-]")

_log = structlog.stdlib.get_logger(__name__)


class IgnoredFieldRefused(UnsupportedParameter):
    """A field without effect, refused because the settings say so.

    Attributes:
        name: of the field within the object that holds it.
    """

    def __init__(self, name: str, reason: str, *, param: str) -> None:
        super().__init__(f"{param}: {reason}; leave it out", param=param)
        self.name = name
        self.reason = reason

    def at(self, path: str) -> "IgnoredFieldRefused":
        """The error for an object at another path in the body."""
        return IgnoredFieldRefused(self.name, self.reason, param=f"{path}.{self.name}" if path else self.name)


@dataclass(slots=True)
class IgnoredFields:
    """The fields of one request that have no effect.

    Attributes:
        labels: by name, each once: the name where it is a known one, else OTHER.
        num_more: names beyond those that are kept.
    """

    policy: UnknownFields = "warn"
    labels: dict[str, str] = field(default_factory=dict)
    num_more: int = 0

    def add(self, name: str, *, is_known: bool) -> None:
        """Remember a field."""
        shown = _UNSAFE.sub("?", name[:_MAX_NAME_CHARS])
        if shown in self.labels:
            return
        if len(self.labels) == _MAX_NAMES:
            self.num_more += 1
            return
        self.labels[shown] = shown if is_known else OTHER

    @property
    def header(self) -> str | None:
        """Value of the response header, None for none."""
        if not self.labels or self.policy != "warn":
            return None
        more = (f"and {self.num_more} more",) if self.num_more else ()
        return ", ".join((*self.labels, *more))


_current: ContextVar[IgnoredFields | None] = ContextVar("ignored_fields", default=None)


@contextmanager
def collect_ignored(fields: IgnoredFields) -> Iterator[None]:
    """Let `ignore_field` add to these fields in everything that runs within, threads and tasks included."""
    token = _current.set(fields)
    try:
        yield
    finally:
        _current.reset(token)


def ignore_field(
    name: str, *, prefix: str = "", is_known: bool = True, reason: str = "this server does not know the field"
) -> None:
    """Take note that a field of the request being handled has no effect.

    Args:
        name: within the object that holds it.
        prefix: path of that object in the request, with a dot behind it; "" for the body itself.
        is_known: the name stands in a table here, so that there are not many of them.

    Raises:
        IgnoredFieldRefused: the settings say so.
    """
    fields = _current.get()
    if fields is None:
        return
    if fields.policy == "refuse":
        raise IgnoredFieldRefused(name, reason, param=prefix + name)
    fields.add(prefix + name, is_known=is_known)


class IgnoredFieldsLog:
    """Logs each field without effect once for as long as the process lives."""

    def __init__(self) -> None:
        self._logged: set[str] = set()

    def report(self, fields: IgnoredFields) -> None:
        """Log those that are new."""
        if fields.policy != "warn":
            return
        for name in fields.labels:
            if name not in self._logged and len(self._logged) < _MAX_LOGGED:
                self._logged.add(name)
                _log.warning("request field ignored", field=name, hint="logged once; counted in cllm_ignored_fields")
