"""Token usage and timing of one response, read from its messages without delaying them.

The engine's own `usage` counts where the response has it; a stream without it is counted by its
events, about one per token. An estimate is used only to charge a limit, never shown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol

from starlette.types import Message, Send

BYTES_PER_TOKEN = 4
READ_BYTES = 8 * 2**20
"""Larger responses in one piece are not parsed for their usage but charged by their length."""
_LISTS = (
    *("prompt", "prompt_embeds", "messages", "input", "texts", "items", "documents"),
    *("text_1", "text_2"),
)
_DATA = b"data: "
_LAST = (b"data: [DONE]", b'"response.completed"', b'"message_stop"')


def estimate_prompt(body_bytes: int) -> int:
    """Estimate the tokens of a request before it runs: a quarter of its bytes, at least one."""
    return max(1, body_bytes // BYTES_PER_TOKEN)


def count_completions(document: Mapping[str, Any]) -> int:
    """Count the engine requests of a body: its prompts times `n`.

    Lists of prompts and single conversations are distinguished by their items.
    """
    prompts = 1
    for name in _LISTS:
        found = document.get(name)
        if isinstance(found, list) and found and isinstance(found[0], str | list):
            prompts = max(prompts, len(found))
    questions = document.get("questions")
    if isinstance(questions, dict):
        prompts = max(prompts, len(questions))
    try:
        # As lenient as vLLM, which reads "4" and 4.0 as 4.
        return prompts * max(1, int(float(document.get("n") or 1)))
    except (TypeError, ValueError, OverflowError):
        return prompts


class StreamObserver(Protocol):
    """Observer of a response, called after a message was sent."""

    def wants(self, event: bytes) -> bool:
        """Return whether the documents in these events of a stream are to be parsed."""
        ...

    def read(self, document: dict[str, Any]) -> None:
        """Take a whole response, or one wanted event."""
        ...

    def on_chunk(self, event: bytes) -> None:
        """Take events of a stream that were sent; called after `read` of those wanted."""
        ...


class UsageMeter:
    """Replacement of `send` during one request; `tokens` is what to charge at any time.

    `hide_usage`: withhold a stream's last event, which has the usage only, as we requested it and
    the client did not. `prompt` and `completion` are the engine's own counts, None and 0 while
    unknown.
    """

    def __init__(
        self,
        send: Send,
        estimate_tokens: int,
        observer: StreamObserver | None = None,
        *,
        hide_usage: bool = False,
    ) -> None:
        self._send = send
        self._estimate = estimate_tokens
        self._observer = observer
        self._hide = hide_usage
        self._events = 0
        self._bytes = 0
        self._parts: list[bytes] = []
        self.status: int | None = None
        self.streams = False
        self.prompt: int | None = None
        self.completion = 0
        self.complete = False
        """The response was sent completely."""
        self.broken = False
        """A stream reported an error after it had started."""
        self.disconnected = False
        """The client was disconnected when a message was to be sent."""

    async def send(self, message: Message) -> None:
        """Send a message and count it."""
        kind, chunk = message["type"], message.get("body", b"")
        if self._hide and self.streams and b'"usage"' in chunk:
            message = self._without_usage(message)
            if not message["body"] and message.get("more_body", False):
                self._observe(chunk)
                return
        try:
            await self._send(message)
        except OSError:
            self.disconnected = True
            raise
        if kind == "http.response.body":
            self._observe(chunk)
            if not message.get("more_body", False):
                self.complete = True
        elif kind == "http.response.start":
            self.status = message["status"]
            types = [v for k, v in message.get("headers", ()) if k.lower() == b"content-type"]
            self.streams = bool(types) and types[0].startswith(b"text/event-stream")

    @property
    def tokens(self) -> int:
        """Tokens to charge: none for an error, an estimate while nothing better is known."""
        if self.status is not None and self.status >= 400:
            return 0
        self.settle()
        if self.prompt is not None:
            # A stream cut short may have reported its prompt and not yet its completion.
            return self.prompt + (self.completion or self._events)
        length = self._events if self.streams else self._bytes // BYTES_PER_TOKEN
        return self._estimate + length

    @property
    def counts(self) -> tuple[int, int]:
        """Prompt and completion tokens as far as known: none for an error, no estimates.

        A stream without usage has its events as completion tokens.
        """
        if self.status is not None and self.status >= 400:
            return 0, 0
        self.settle()
        return self.prompt or 0, self.completion or (self._events if self.streams else 0)

    def _observe(self, chunk: bytes) -> None:
        if not self.streams:
            self._bytes += len(chunk)
            if self._bytes <= READ_BYTES:
                self._parts.append(chunk)
            else:
                self._parts.clear()
            return
        self._events += chunk.count(b"\n" + _DATA) + chunk.startswith(_DATA)
        observer = self._observer
        wanted = observer is not None and observer.wants(chunk)
        if wanted or b'"usage"' in chunk:
            for line in chunk.split(b"\n"):
                if line.startswith(_DATA) and (wanted or b'"usage"' in line):
                    document = _parse(line[len(_DATA) :])
                    self._take_usage(document)
                    if wanted and observer is not None:
                        observer.read(document)
        if observer is not None:
            observer.on_chunk(chunk)
        if chunk.startswith(b'data: {"error"'):
            self.broken = True
        elif any(mark in chunk for mark in _LAST):
            self.complete = True

    def settle(self) -> None:
        """Parse a response that is no stream, as far as it was sent; a complete one once."""
        if self.streams or not self._parts:
            return
        document = _parse(b"".join(self._parts))
        self._take_usage(document)
        if self.complete:
            self._parts.clear()
            if self._observer is not None:
                self._observer.read(document)

    def _take_usage(self, document: dict[str, Any]) -> None:
        # The Responses API and Anthropic's first event wrap the object.
        inner = document.get("response") or document.get("message")
        usage = document.get("usage") or (inner.get("usage") if isinstance(inner, dict) else None)
        if not isinstance(usage, dict):
            return
        prompt = _count(usage, "prompt_tokens", "input_tokens")
        if prompt is not None:
            self.prompt = max(prompt, self.prompt or 0)
        completion = _count(usage, "completion_tokens", "output_tokens")
        self.completion = max(completion or 0, self.completion)

    def _without_usage(self, message: Message) -> Message:
        events = [e for e in message["body"].split(b"\n\n") if not _is_usage(e)]
        return {**message, "body": b"\n\n".join(events)}


def _is_usage(event: bytes) -> bool:
    """Return whether an event has the usage of the whole response and no part of a completion."""
    if not event.startswith(_DATA) or b'"usage"' not in event:
        return False
    document = _parse(event[len(_DATA) :])
    return document.get("choices") == [] and isinstance(document.get("usage"), dict)


def _parse(text: bytes) -> dict[str, Any]:
    """Parse a JSON object; anything else is an empty one."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _count(usage: dict[str, Any], *names: str) -> int | None:
    for name in names:
        value = usage.get(name)
        if isinstance(value, int) and value >= 0:
            return value
    return None
