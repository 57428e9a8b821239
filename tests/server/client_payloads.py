"""Requests as real clients build them, from payloads/*.json: one file a client, see payloads/README.md."""

import json
from pathlib import Path
from typing import Any

import msgspec

FOLDER = Path(__file__).parent / "payloads"

# Stand for values of the answer to `before`, which a client that takes it up sends back.
_RESPONSE_ID, _OUTPUT_ID = "{response id}", "{output id}"


class Payload(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One request, what the server must make of it, and the answer that must come back.

    Attributes:
        about: what is special in it, a few words.
        path: of the endpoint.
        body: as sent, but with texts of our own; the model is called "tiny".
        headers: beyond those of any request, where the client sends some of note.
        before: body of a request to the same endpoint that has to be answered first.
        status: of the answer.
        ignored: fields that the answer's header reports as without effect; no other may be.
        params: every field of SamplingParams that is not at its default, except the grammar. No max_tokens means that
            the output may fill the context.
        prompt: the whole prompt, of a completion.
        conversation: role and text of every message after the system prompt, as the model reads them.
        system: beginning of the system prompt.
        functions: names of the functions that the model is told of.
        matches: outputs that the request's grammar allows; with no entry here or in `rejects` there must be no grammar.
        rejects: outputs that it forbids.
        says: what the model answers.
        text: what the client reads of it.
        calls: names and arguments of the calls that the client reads.
        finish_reason: as the client reads it; that of a response is its status.
        xfail: why the server does not do so yet.
    """

    about: str
    path: str
    body: dict[str, Any]
    headers: dict[str, str] = {}
    before: dict[str, Any] | None = None
    status: int = 200
    ignored: list[str] = []
    params: dict[str, Any] = {}
    prompt: str | None = None
    conversation: list[tuple[str, str]] | None = None
    system: str | None = None
    functions: list[str] = []
    matches: list[str] = []
    rejects: list[str] = []
    says: str = "Fine."
    text: str | None = "Fine."
    calls: list[tuple[str, dict[str, Any]]] = []
    finish_reason: str = "stop"
    xfail: str = ""

    def body_after(self, answer: dict[str, Any]) -> dict[str, Any]:
        """The body with the ids of the answer to `before` in it."""
        text = json.dumps(self.body)
        text = text.replace(_RESPONSE_ID, answer["id"]).replace(_OUTPUT_ID, answer["output"][0]["id"])
        body: dict[str, Any] = json.loads(text)
        return body


class ClientPayloads(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Requests of one client.

    Attributes:
        client: its name.
        version: that the requests are of.
        obtained: "recorded" from a run of the client, or what they were written from.
        requests: some of what it sends, chosen for what is special.
    """

    client: str
    version: str
    obtained: str
    requests: list[Payload]


def read_payloads() -> dict[str, Payload]:
    """All requests, by client and what they are about."""
    clients = [
        msgspec.json.decode(path.read_bytes(), type=ClientPayloads, strict=True)
        for path in sorted(FOLDER.glob("*.json"))
    ]
    return {f"{client.client}: {request.about}": request for client in clients for request in client.requests}
