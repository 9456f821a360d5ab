"""Tokens read from responses as vLLM writes them, whole, streamed, broken off or silent."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.types import Message

from safegene_server.metrics.token_metering import (
    READ_BYTES,
    UsageMeter,
    count_completions,
    estimate_prompt,
)

ESTIMATE = 50


@pytest.mark.parametrize(
    ("document", "completions"),
    [
        ({}, 1),
        ({"n": 1}, 1),
        ({"n": None}, 1),
        ({"n": 100}, 100),
        ({"n": "100"}, 100),
        ({"n": "4.0"}, 4),
        ({"n": 0}, 1),
        ({"n": -3}, 1),
        ({"n": "many"}, 1),
        ({"n": [9]}, 1),
        ({"n": "inf"}, 1),
        ({"prompt": "one"}, 1),
        ({"prompt": [1, 2, 3]}, 1),
        ({"prompt": []}, 1),
        ({"prompt": ["a", "b", "c"]}, 3),
        ({"prompt": [[1, 2], [3]], "n": 4}, 8),
        ({"messages": [{"role": "user"}, {"role": "assistant"}], "n": 2}, 2),
        ({"messages": [[{"role": "user"}], [{"role": "user"}]]}, 2),
        ({"input": [{"role": "user"}, {"role": "user"}]}, 1),
        ({"input": ["a", "b"]}, 2),
        ({"query": "q", "documents": ["a", "b", "c"]}, 3),
        ({"questions": {"a": {}, "b": {}}}, 2),
    ],
)
def test_completions_of_a_body_are_counted(document: dict[str, Any], completions: int) -> None:
    assert count_completions(document) == completions


def metered(*chunks: bytes, kind: bytes = b"application/json", status: int = 200) -> int:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def run() -> int:
        meter = UsageMeter(send, ESTIMATE)
        start: Message = {
            "type": "http.response.start",
            "status": status,
            "headers": [(b"content-type", kind)],
        }
        messages = [start]
        messages += [
            {"type": "http.response.body", "body": chunk, "more_body": True} for chunk in chunks
        ]
        for message in messages:
            await meter.send(message)
        assert [id(message) for message in sent] == [id(message) for message in messages]
        return meter.tokens

    return asyncio.run(run())


def events(*documents: object) -> tuple[bytes, ...]:
    return tuple(b"data: %s\n\n" % json.dumps(document).encode() for document in documents)


SSE = b"text/event-stream; charset=utf-8"
DELTA = {"choices": [{"delta": {"content": 'a "usage": {"prompt_tokens": 9} data: x\ndata: y'}}]}


def test_the_estimate_of_a_prompt() -> None:
    assert [estimate_prompt(size) for size in (0, 3, 4, 2000)] == [1, 1, 1, 500]


def test_tokens_before_any_response() -> None:
    async def send(message: Message) -> None:
        raise AssertionError

    assert UsageMeter(send, ESTIMATE).tokens == ESTIMATE


def test_an_error_costs_nothing() -> None:
    assert metered(b'{"error": {}}', status=400) == 0


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12},
        {"input_tokens": 7, "output_tokens": 5},
    ],
)
def test_a_whole_response_in_chunks(usage: dict[str, int]) -> None:
    document = {"metadata": {"usage": {"prompt_tokens": 1}}, "usage": usage, "text": "x" * 100}
    response = json.dumps(document).encode()
    assert metered(response) == 12
    assert metered(response[:60], response[60:70], response[70:]) == 12


def test_embeddings_have_a_prompt_only() -> None:
    assert metered(b'{"usage":{"prompt_tokens":7,"total_tokens":7}}') == 7


@pytest.mark.parametrize(
    "response", [b"\x00" * 80, b"x" * 80, b'{"usage":null}'.ljust(80), b"[]" * 40]
)
def test_a_response_without_usage_is_charged_by_its_length(response: bytes) -> None:
    assert metered(response) == ESTIMATE + 20


def test_a_huge_response_is_charged_by_its_length() -> None:
    piece = b"x" * 2**20
    count = READ_BYTES // len(piece) + 1
    assert metered(*[piece] * count) == ESTIMATE + count * len(piece) // 4


def test_a_stream_without_usage_is_charged_by_its_events() -> None:
    assert metered(*events(DELTA, DELTA, DELTA), kind=SSE) == ESTIMATE + 3
    assert metered(b"".join(events(DELTA, DELTA, DELTA)), kind=SSE) == ESTIMATE + 3


def test_a_stream_that_ends_with_its_usage() -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}
    assert metered(*events(DELTA, DELTA, usage), b"data: [DONE]\n\n", kind=SSE) == 9


def test_a_stream_with_usage_in_every_event() -> None:
    each = [{"usage": {"prompt_tokens": 7, "completion_tokens": n}} for n in range(4)]
    assert metered(*events(*each), kind=SSE) == 10


def test_the_responses_api_wraps_its_usage() -> None:
    done = {
        "type": "response.completed",
        "response": {"usage": {"input_tokens": 7, "output_tokens": 3}},
    }
    created = {"type": "response.created", "response": {"usage": None}}
    named = [b"event: x\n" + event for event in events(created, DELTA, done)]
    assert metered(*named, kind=SSE) == 10


def test_usage_of_an_anthropic_stream() -> None:
    start = {"message": {"usage": {"input_tokens": 7, "output_tokens": 0}}}
    end = {"usage": {"output_tokens": 3}}
    assert metered(*events(start, DELTA, end), kind=SSE) == 10
    # Broken off: the prompt is known, the completion is counted.
    assert metered(*events(start, DELTA, DELTA), kind=SSE) == 7 + 3


# -- hidden usage, and observers ------------------------------------------------------------------

USAGE = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}
DONE = b"data: [DONE]\n\n"


class Recorder:
    """An observer that wants everything."""

    def __init__(self) -> None:
        self.documents: list[dict[str, object]] = []
        self.events: list[bytes] = []

    def wants(self, event: bytes) -> bool:
        return True

    def read(self, document: dict[str, object]) -> None:
        self.documents.append(document)

    def on_chunk(self, event: bytes) -> None:
        self.events.append(event)


def streamed(*chunks: bytes, hide: bool, kind: bytes = SSE) -> tuple[bytes, UsageMeter, Recorder]:
    """(what the client got, the meter, its observer)."""
    sent: list[bytes] = []

    async def send(message: Message) -> None:
        sent.append(message.get("body", b""))

    async def run() -> tuple[bytes, UsageMeter, Recorder]:
        recorder = Recorder()
        meter = UsageMeter(send, ESTIMATE, recorder, hide_usage=hide)
        headers = [(b"content-type", kind)]
        await meter.send({"type": "http.response.start", "status": 200, "headers": headers})
        for chunk in chunks:
            await meter.send({"type": "http.response.body", "body": chunk, "more_body": True})
        await meter.send({"type": "http.response.body", "body": b"", "more_body": False})
        meter.settle()
        return b"".join(sent), meter, recorder

    return asyncio.run(run())


def test_usage_that_the_client_did_not_request_is_hidden_and_counted() -> None:
    chunks = (*events(DELTA, USAGE), DONE)
    got, meter, _ = streamed(*chunks, hide=True)
    assert got == chunks[0] + DONE
    assert (meter.prompt, meter.completion, meter.tokens) == (7, 2, 9)
    got, meter, _ = streamed(b"".join(chunks), hide=True)
    assert got == chunks[0] + DONE
    assert meter.tokens == 9
    assert streamed(*chunks, hide=False)[0] == b"".join(chunks)


@pytest.mark.parametrize(
    "event",
    [
        {"choices": [{"delta": {"content": "x"}}], "usage": {"prompt_tokens": 7}},
        {"choices": [], "usage": None},
        {"choices": [{"delta": {"content": '"choices": [], "usage": {}'}}]},
        {"usage": {"prompt_tokens": 7}},
    ],
)
def test_only_the_usage_event_is_hidden(event: dict[str, object]) -> None:
    chunks = events(event)
    assert streamed(*chunks, hide=True)[0] == chunks[0]


def test_a_whole_response_retains_its_usage() -> None:
    whole = json.dumps(USAGE).encode()
    got, meter, recorder = streamed(whole, hide=True, kind=b"application/json")
    assert (got, meter.tokens) == (whole, 9)
    assert recorder.documents == [USAGE]


def test_a_watch_hears_every_event_and_reads_each_document_once() -> None:
    _, meter, recorder = streamed(*events(DELTA, USAGE), DONE, hide=False)
    assert recorder.documents == [DELTA, USAGE, {}]
    assert recorder.events == [*events(DELTA, USAGE), DONE, b""]
    assert meter.complete and not meter.broken


def test_a_stream_that_breaks_says_so() -> None:
    _, meter, _ = streamed(*events(DELTA, {"error": {"message": "no"}}), hide=False)
    assert meter.broken


def test_a_client_that_disconnected_before_a_send() -> None:
    async def send(message: Message) -> None:
        raise OSError

    meter = UsageMeter(send, ESTIMATE)
    with pytest.raises(OSError):
        asyncio.run(meter.send({"type": "http.response.start", "status": 200, "headers": []}))
    assert meter.disconnected
