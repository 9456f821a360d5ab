"""How many tokens an answer cost, read from the answer on its way out.

Looks at the messages without holding them back or changing them. The engine's own `usage` counts
where the answer has it; a stream that was not asked for it is counted by its events, about one a
token. An estimate is used only to charge a limit, never shown.
"""

from __future__ import annotations

import json
from typing import Any

from starlette.types import Message, Send

BYTES_PER_TOKEN = 4
READ_BYTES = 8 * 2**20
"""A longer answer in one piece is not parsed for its usage but charged by its length."""


def estimate_prompt(body_bytes: int) -> int:
    """Tokens of a request not yet run: a quarter of its bytes, at least one."""
    return max(1, body_bytes // BYTES_PER_TOKEN)


class Meter:
    """Stands in for `send` during one request; `tokens` is what to charge, at any moment."""

    def __init__(self, send: Send, estimate_tokens: int) -> None:
        self._send = send
        self._estimate = estimate_tokens
        self._status: int | None = None
        self._streams = False
        self._events = 0
        self._bytes = 0
        self._parts: list[bytes] = []
        self._prompt: int | None = None
        self._completion = 0

    async def send(self, message: Message) -> None:
        await self._send(message)
        if message["type"] == "http.response.body":
            self._look(message.get("body", b""))
        elif message["type"] == "http.response.start":
            self._status = message["status"]
            kinds = [v for k, v in message.get("headers", ()) if k.lower() == b"content-type"]
            self._streams = bool(kinds) and kinds[0].startswith(b"text/event-stream")

    @property
    def tokens(self) -> int:
        """Nothing for an error; the estimate while nothing better is known."""
        if self._status is not None and self._status >= 400:
            return 0
        if not self._streams and 0 < self._bytes <= READ_BYTES:
            self._read(b"".join(self._parts))
        if self._prompt is not None:
            # A stream cut short may have told of its prompt and not yet of its answer.
            return self._prompt + (self._completion or self._events)
        length = self._events if self._streams else self._bytes // BYTES_PER_TOKEN
        return self._estimate + length

    def _look(self, chunk: bytes) -> None:
        if self._streams:
            self._events += chunk.count(b"\ndata: ") + chunk.startswith(b"data: ")
            if b'"usage"' in chunk:
                for line in chunk.split(b"\n"):
                    if line.startswith(b"data: ") and b'"usage"' in line:
                        self._read(line[len(b"data: ") :])
            return
        self._bytes += len(chunk)
        if self._bytes <= READ_BYTES:
            self._parts.append(chunk)
        else:
            self._parts.clear()

    def _read(self, document: bytes) -> None:
        """Take the usage of a whole answer or of one event; what is no JSON tells nothing."""
        try:
            found = json.loads(document)
        except (ValueError, RecursionError):
            return
        if not isinstance(found, dict):
            return
        # The Responses API and Anthropic's first event wrap what they report.
        inner = found.get("response") or found.get("message")
        usage = found.get("usage") or (inner.get("usage") if isinstance(inner, dict) else None)
        if not isinstance(usage, dict):
            return
        prompt = _count(usage, "prompt_tokens", "input_tokens")
        if prompt is not None:
            self._prompt = max(prompt, self._prompt or 0)
        completion = _count(usage, "completion_tokens", "output_tokens")
        self._completion = max(completion or 0, self._completion)


def _count(usage: dict[str, Any], *names: str) -> int | None:
    for name in names:
        value = usage.get(name)
        if isinstance(value, int) and value >= 0:
            return value
    return None
