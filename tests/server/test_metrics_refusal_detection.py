"""Refusals found in responses of every shape, whole and in pieces, with bounded reading."""

from __future__ import annotations

import json
from typing import Any

import pytest

from safegene_server.metrics.refusal_detection import RefusalDetector
from safegene_vllm.evaluation.judges import OPENING_CHARS

NO = "I'm sorry, but I can't help with that."
YES = "Here is how it is done, step by step."


def chat(text: str | None, index: int = 0) -> dict[str, Any]:
    return {"index": index, "message": {"role": "assistant", "content": text}}


def delta(text: str | None, index: int = 0) -> dict[str, Any]:
    return {"choices": [{"index": index, "delta": {"content": text}}]}


def event(document: dict[str, Any]) -> bytes:
    return b"data: %s\n\n" % json.dumps(document, separators=(",", ":")).encode()


def judged(*documents: dict[str, Any], ended: bool = True) -> tuple[int, int]:
    openings = RefusalDetector()
    for document in documents:
        openings.read(document)
    return openings.judged(ended)


@pytest.mark.parametrize(
    ("document", "found"),
    [
        ({"choices": [chat(NO)]}, (1, 1)),
        ({"choices": [chat(YES)]}, (1, 0)),
        ({"choices": [chat(NO), chat(YES, 1), chat("  " + NO.upper(), 2)]}, (3, 2)),
        ({"choices": [{"index": 0, "text": NO}, {"index": 1, "text": YES}]}, (2, 1)),
        ({"choices": [chat(None)]}, (0, 0)),
        ({"choices": [chat(" \n ")]}, (0, 0)),
        ({"choices": [chat(YES + " " * OPENING_CHARS + NO)]}, (1, 0)),
        ({"choices": []}, (0, 0)),
        ({"choices": [[], None, {"message": "text"}, {"text": 3}]}, (0, 0)),
        ({"object": "list", "data": [{"embedding": [0.1]}]}, (0, 0)),
        ({"type": "message", "content": [{"type": "text", "text": NO}]}, (1, 1)),
        (
            {
                "object": "response",
                "output": [
                    {"type": "reasoning", "content": [{"text": NO}]},
                    {"type": "message", "content": [{"type": "output_text", "text": YES}]},
                ],
            },
            (1, 0),
        ),
    ],
)
def test_whole_responses(document: dict[str, Any], found: tuple[int, int]) -> None:
    assert judged(document) == found


@pytest.mark.parametrize(
    "pieces",
    [
        [delta("I'm so"), delta("rry, "), delta(None), delta("but")],
        [{"choices": [{"index": 0, "text": t}]} for t in ("I can", "not help")],
        [{"type": "response.output_text.delta", "output_index": 1, "delta": "I cannot"}],
        [{"type": "content_block_delta", "delta": {"type": "text_delta", "text": "I cannot"}}],
    ],
)
def test_a_refusal_in_pieces(pieces: list[dict[str, Any]]) -> None:
    assert judged(*pieces) == (1, 1)


def test_choices_that_stream_side_by_side() -> None:
    assert judged(delta("I can", 0), delta("Sure", 1), delta("not", 0), delta(".", 1)) == (2, 1)


def test_a_broken_response_is_judged_only_with_a_complete_opening() -> None:
    assert judged(delta("I cannot"), ended=False) == (0, 0)
    assert judged(delta("I cannot " + "x" * OPENING_CHARS), ended=False) == (1, 1)


class CountedEvent(bytes):
    """An event that counts how often it is searched."""

    searched = 0

    def __contains__(self, part: object) -> bool:
        CountedEvent.searched += 1
        return super().__contains__(part)  # type: ignore[operator]


def test_an_event_is_searched_as_often_however_many_choices_are_done() -> None:
    openings = RefusalDetector()
    for choice in range(1000):
        openings.read(delta("x" * OPENING_CHARS, choice))
    assert openings.wants(CountedEvent(event(delta("a", 1000))))
    assert not openings.wants(event(delta("a", 999)))
    assert openings.judged(ended=False) == (1000, 0)
    assert CountedEvent.searched <= 2


def test_a_choice_with_a_complete_opening_is_not_read_further() -> None:
    openings = RefusalDetector()
    assert openings.wants(event(delta("a")))
    openings.read(delta("x" * OPENING_CHARS))
    assert not openings.wants(event(delta("b")))
    assert openings.wants(event(delta("b", 1)))
    assert openings.wants(event(delta("b", 10)))
    # The mark of a choice in the text of another: quotes in JSON are escaped.
    assert openings.wants(event(delta('index":0,', 1)))
    openings.read(delta(NO))
    assert openings.judged(True) == (1, 0)


@pytest.mark.parametrize("other", [b"data: [DONE]\n\n", b": ping\n\n", b'data: {"choices":[]}\n\n'])
def test_events_without_text_are_not_read(other: bytes) -> None:
    assert not RefusalDetector().wants(other)
