"""Refusal detection on the first characters of every choice of a response.

For OpenAI's chat, completions and responses and Anthropic's messages. Judges by the opening words
alone (`is_refusal`): fast, and blind to refusals in unusual words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from safegene_vllm.evaluation.judges import OPENING_CHARS, is_refusal

_INDEX = re.compile(rb'index":(-?\d+),')


class RefusalDetector:
    """Collects the opening of each choice from the documents of one response."""

    def __init__(self) -> None:
        self._texts: dict[int, str] = {}
        self._done: set[bytes] = set()

    def wants(self, event: bytes) -> bool:
        """Return whether an event has text of a choice whose opening is incomplete.

        Searches for a few bytes only, because it runs on every event of a stream.
        """
        if b'"delta"' not in event and b'"text"' not in event:
            return False
        # One pass over the event, however many choices are done: `n` may be thousands.
        return not (self._done and any(mark in self._done for mark in _INDEX.findall(event)))

    def read(self, document: dict[str, Any]) -> None:
        """Take a whole response, or one event of a stream."""
        for choice, piece in _texts(document):
            if b"%d" % choice in self._done:
                continue
            text = (self._texts.get(choice, "") + piece).lstrip()
            self._texts[choice] = text
            if len(text) >= OPENING_CHARS:
                self._done.add(b"%d" % choice)

    def judged(self, ended: bool) -> tuple[int, int]:
        """Return (choices judged, refusals among them).

        Of a response that did not end only complete openings are judged.
        """
        texts = [
            text
            for choice, text in self._texts.items()
            if text and (ended or b"%d" % choice in self._done)
        ]
        return len(texts), sum(map(is_refusal, texts))


def _texts(document: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """Iterate over (choice, text); nothing from a document of another shape."""
    for choice in _dicts(document.get("choices")):
        message = choice.get("delta") or choice.get("message")
        text = message.get("content") if isinstance(message, dict) else choice.get("text")
        index = choice.get("index")
        if isinstance(text, str):
            yield index if isinstance(index, int) else 0, text
    kind, delta = document.get("type"), document.get("delta")
    if kind == "response.output_text.delta" and isinstance(delta, str):
        index = document.get("output_index")
        yield index if isinstance(index, int) else 0, delta
    elif kind == "content_block_delta" and isinstance(delta, dict):
        if isinstance(text := delta.get("text"), str):
            yield 0, text
    elif kind == "message":
        yield 0, _joined(document.get("content"))
    elif document.get("object") == "response":
        for index, item in enumerate(_dicts(document.get("output"))):
            if item.get("type") == "message":
                yield index, _joined(item.get("content"))


def _joined(parts: object) -> str:
    return "".join(text for part in _dicts(parts) if isinstance(text := part.get("text"), str))


def _dicts(found: object) -> Iterator[dict[str, Any]]:
    if isinstance(found, list):
        yield from (item for item in found if isinstance(item, dict))
