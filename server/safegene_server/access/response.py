"""What a client sees of the revision that served it: headers, and the `model` of its response.

vLLM names the revision, `acme@7`, as the model of a response. Clients that compare the name with
the one they requested get that one; the revision is in a header and in `system_fingerprint`.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping

from starlette.types import Message, Scope, Send

REQUEST_ID = b"x-request-id"
REVISION = b"x-safegene-revision"
EXPOSED = (
    b"x-request-id, x-safegene-revision, retry-after, "
    b"x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests, "
    b"x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens"
)
"""Headers that a script of another origin may read."""
_ID = re.compile(rb"[\x21-\x7e]{1,128}")
# A quote inside of a JSON string is escaped, so these match keys alone, never a completion's text.
_FINGERPRINT = re.compile(rb'"system_fingerprint":\s?(null|"((?:[^"\\]|\\.)*)")')


def request_id(scope: Scope) -> bytes:
    """Return the client's `X-Request-Id` if it is one printable word, else a new one."""
    given = [value for name, value in scope["headers"] if name == REQUEST_ID]
    if len(given) == 1 and _ID.fullmatch(given[0]):
        return bytes(given[0])
    return uuid.uuid4().hex.encode()


class ResponseHeaders:
    """Adds headers to a response; `extra` may be filled until it starts.

    A header that the app set itself stays as it is. `exposed`: for a script of another origin.
    """

    def __init__(self, send: Send, extra: Mapping[bytes, bytes], *, exposed: bool) -> None:
        self._send = send
        self._exposed = exposed
        self.extra = dict(extra)

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", ()))
            present = {name.lower() for name, _ in headers}
            headers += [(n, v) for n, v in self.extra.items() if n not in present]
            if self._exposed:
                headers.append((b"access-control-expose-headers", EXPOSED))
            message = {**message, "headers": headers}
        await self._send(message)


class RequestedName:
    """Sends a response under the name that the client requested in place of the revision's.

    A stream is changed event by event; a JSON document, whose length changes, once it is complete.
    """

    def __init__(self, send: Send, requested: str, served: str) -> None:
        self._send = send
        self._old = re.compile(rb'"model":\s?' + re.escape(json.dumps(served).encode()))
        self._new = b'"model":' + json.dumps(requested).encode()
        self._served = json.dumps(served).encode()[1:-1]
        self._start: Message | None = None
        self._json = self._stream = False
        self._parts: list[bytes] = []

    async def send(self, message: Message) -> None:
        kind = message["type"]
        if kind == "http.response.start":
            types = [v for k, v in message.get("headers", ()) if k.lower() == b"content-type"]
            found = types[0] if types else b""
            self._stream = found.startswith(b"text/event-stream")
            self._json = found.startswith(b"application/json") and message["status"] == 200
            if self._json:
                self._start = message
                return
        elif kind == "http.response.body" and self._json:
            self._parts.append(message.get("body", b""))
            if message.get("more_body", False):
                return
            await self._send_document()
            return
        elif kind == "http.response.body" and self._stream:
            message = {**message, "body": self._renamed(message.get("body", b""))}
        await self._send(message)

    async def _send_document(self) -> None:
        assert self._start is not None
        body = self._renamed(b"".join(self._parts))
        self._parts.clear()
        headers = [
            (name, str(len(body)).encode() if name.lower() == b"content-length" else value)
            for name, value in self._start.get("headers", ())
        ]
        await self._send({**self._start, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    def _renamed(self, chunk: bytes) -> bytes:
        if b'"model"' in chunk:
            chunk = self._old.sub(lambda _: self._new, chunk)
        if b'"system_fingerprint"' in chunk:
            chunk = _FINGERPRINT.sub(self._fingerprint, chunk)
        return chunk

    def _fingerprint(self, match: re.Match[bytes]) -> bytes:
        before = match[2] + b":" if match[2] else b""
        return b'"system_fingerprint":"' + before + self._served + b'"'
