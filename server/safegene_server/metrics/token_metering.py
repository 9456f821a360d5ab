"""What an answer cost and when it spoke, read from the answer on its way out.

Looks at the messages without holding them back. The engine's own `usage` counts where the answer
has it; a stream without it is counted by its events, about one a token. An estimate is used only
to charge a limit, never shown. Every document is parsed once, for whoever wants to know.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol

from starlette.types import Message, Send

BYTES_PER_TOKEN = 4
READ_BYTES = 8 * 2**20
"""A longer answer in one piece is not parsed for its usage but charged by its length."""
_SEVERAL = (
    *("prompt", "prompt_embeds", "messages", "input", "texts", "items", "documents"),
    *("text_1", "text_2"),
)
_DATA = b"data: "
_LAST = (b"data: [DONE]", b'"response.completed"', b'"message_stop"')


def estimate_prompt(body_bytes: int) -> int:
    """Tokens of a request not yet run: a quarter of its bytes, at least one."""
    return max(1, body_bytes // BYTES_PER_TOKEN)


def count_answers(document: Mapping[str, Any]) -> int:
    """How many requests of the engine a body is: its prompts times `n`.

    What is a list in some routes and one conversation in others is told by what it holds.
    """
    prompts = 1
    for name in _SEVERAL:
        found = document.get(name)
        if isinstance(found, list) and found and isinstance(found[0], str | list):
            prompts = max(prompts, len(found))
    questions = document.get("questions")
    if isinstance(questions, dict):
        prompts = max(prompts, len(questions))
    try:
        # As lenient as the host, which reads "4" and 4.0 as 4.
        return prompts * max(1, int(float(document.get("n") or 1)))
    except (TypeError, ValueError, OverflowError):
        return prompts


class StreamObserver(Protocol):
    """Whoever follows an answer; told after a message was sent on."""

    def wants(self, event: bytes) -> bool:
        """Whether the documents in these events of a stream are to be read."""
        ...

    def read(self, document: dict[str, Any]) -> None:
        """A whole answer, or one event that was wanted."""
        ...

    def spoke(self, event: bytes) -> None:
        """Events of a stream have gone out, after those among them that were wanted were read."""
        ...


class UsageMeter:
    """Stands in for `send` during one request; `tokens` is what to charge, at any moment.

    `hide_usage`: a stream's last event, which tells the usage and nothing else, is kept back: we
    asked for it, the client did not. `prompt` and `completion` are the engine's own counts, None
    and 0 while it has told none.
    """

    def __init__(
        self,
        send: Send,
        estimate_tokens: int,
        watch: StreamObserver | None = None,
        *,
        hide_usage: bool = False,
    ) -> None:
        self._send = send
        self._estimate = estimate_tokens
        self._watch = watch
        self._hide = hide_usage
        self._events = 0
        self._bytes = 0
        self._parts: list[bytes] = []
        self.status: int | None = None
        self.streams = False
        self.prompt: int | None = None
        self.completion = 0
        self.complete = False
        """The answer has been sent to its end."""
        self.broken = False
        """A stream told of an error after it had begun."""
        self.left = False
        """The client was gone when something was to be sent."""

    async def send(self, message: Message) -> None:
        kind, chunk = message["type"], message.get("body", b"")
        if self._hide and self.streams and b'"usage"' in chunk:
            message = self._without_usage(message)
            if not message["body"] and message.get("more_body", False):
                self._look(chunk)
                return
        try:
            await self._send(message)
        except OSError:
            self.left = True
            raise
        if kind == "http.response.body":
            self._look(chunk)
            if not message.get("more_body", False):
                self.complete = True
        elif kind == "http.response.start":
            self.status = message["status"]
            kinds = [v for k, v in message.get("headers", ()) if k.lower() == b"content-type"]
            self.streams = bool(kinds) and kinds[0].startswith(b"text/event-stream")

    @property
    def tokens(self) -> int:
        """Nothing for an error; the estimate while nothing better is known."""
        if self.status is not None and self.status >= 400:
            return 0
        self.settle()
        if self.prompt is not None:
            # A stream cut short may have told of its prompt and not yet of its answer.
            return self.prompt + (self.completion or self._events)
        length = self._events if self.streams else self._bytes // BYTES_PER_TOKEN
        return self._estimate + length

    def _look(self, chunk: bytes) -> None:
        if not self.streams:
            self._bytes += len(chunk)
            if self._bytes <= READ_BYTES:
                self._parts.append(chunk)
            else:
                self._parts.clear()
            return
        self._events += chunk.count(b"\n" + _DATA) + chunk.startswith(_DATA)
        watch = self._watch
        wanted = watch is not None and watch.wants(chunk)
        if wanted or b'"usage"' in chunk:
            for line in chunk.split(b"\n"):
                if line.startswith(_DATA) and (wanted or b'"usage"' in line):
                    found = _document(line[len(_DATA) :])
                    self._take(found)
                    if wanted and watch is not None:
                        watch.read(found)
        if watch is not None:
            watch.spoke(chunk)
        if chunk.startswith(b'data: {"error"'):
            self.broken = True
        elif any(mark in chunk for mark in _LAST):
            self.complete = True

    def settle(self) -> None:
        """Read an answer that is no stream, as far as it is there; a complete one once."""
        if self.streams or not self._parts:
            return
        found = _document(b"".join(self._parts))
        self._take(found)
        if self.complete:
            self._parts.clear()
            if self._watch is not None:
                self._watch.read(found)

    def _take(self, found: dict[str, Any]) -> None:
        """The usage of a whole answer or of one event."""
        # The Responses API and Anthropic's first event wrap what they report.
        inner = found.get("response") or found.get("message")
        usage = found.get("usage") or (inner.get("usage") if isinstance(inner, dict) else None)
        if not isinstance(usage, dict):
            return
        prompt = _count(usage, "prompt_tokens", "input_tokens")
        if prompt is not None:
            self.prompt = max(prompt, self.prompt or 0)
        completion = _count(usage, "completion_tokens", "output_tokens")
        self.completion = max(completion or 0, self.completion)

    def _without_usage(self, message: Message) -> Message:
        kept = [e for e in message["body"].split(b"\n\n") if not _is_usage(e)]
        return {**message, "body": b"\n\n".join(kept)}


def _is_usage(event: bytes) -> bool:
    """Whether an event has the usage of the whole answer and no piece of the answer."""
    if not event.startswith(_DATA) or b'"usage"' not in event:
        return False
    found = _document(event[len(_DATA) :])
    return found.get("choices") == [] and isinstance(found.get("usage"), dict)


def _document(text: bytes) -> dict[str, Any]:
    """What is no JSON object tells nothing."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _count(usage: dict[str, Any], *names: str) -> int | None:
    for name in names:
        value = usage.get(name)
        if isinstance(value, int) and value >= 0:
            return value
    return None
