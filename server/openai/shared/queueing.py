"""Turn: whose request it is and how urgent, for the queue. Nothing of it changes an answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import msgspec
from starlette.requests import Request

from cllm_core.request import NewRequest

from ...http.ignored import ignore_field
from ...response_store import owner_of
from ...settings import ServerSettings
from .sampling import SamplingRequest

_DIGEST_CHARS = 16


@dataclass(frozen=True, slots=True)
class Turn:
    """A call's turn in the queue; the fields are NewRequest's."""

    user: str
    weight: float
    priority: int

    @classmethod
    def of(cls, request: Request, body: SamplingRequest, settings: ServerSettings) -> Self:
        """The turn of a call.

        Users are told apart by their keys where there are several, since these cannot be made up; else by the body.
        """
        priority = body.priority or 0
        if priority and settings.scheduling_policy != "priority":
            ignore_field("priority", is_known=True, reason="this server does not run with --scheduling-policy priority")
            priority = 0
        authorization = request.headers.get("authorization", "")
        name = body.safety_identifier or body.user
        user = owner_of(authorization if len(settings.api_keys) > 1 else f"user {name}" if name else None)
        key = authorization.partition(" ")[2].strip()
        return cls(user[:_DIGEST_CHARS], settings.weights.get(key, 1.0), priority)

    def stamp(self, requests: Sequence[NewRequest]) -> tuple[NewRequest, ...]:
        """The requests with this turn."""
        fields = {"user": self.user, "weight": self.weight, "priority": self.priority}
        return tuple(msgspec.structs.replace(request, **fields) for request in requests)
