"""Bodies: what is understood is what is handed on, and everything odd is a plain 4xx."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from starlette.types import Message, Receive

from safegene_server.access import body as bodies
from safegene_server.access.body import (
    check_size,
    encode,
    headers_for,
    parse,
    read_body,
    replay,
)
from safegene_server.access.rejection import RequestRejectedError
from safegene_server.error_responses import error_response

JSON = [(b"content-type", b"application/json")]
DEPTH = 8

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def receive_of(*messages: Message) -> Receive:
    left = list(messages)

    async def receive() -> Message:
        return left.pop(0)

    return receive


def part(chunk: bytes, more: bool = False) -> Message:
    return {"type": "http.request", "body": chunk, "more_body": more}


def rejected(body: bytes, words: str, status: int = 400) -> RequestRejectedError:
    with pytest.raises(RequestRejectedError) as caught:
        encode(parse(body, DEPTH))
    assert caught.value.status == status
    assert words in str(caught.value)
    return caught.value


@given(st.dictionaries(st.text(), values, max_size=4))
def test_the_forwarded_body_means_what_was_sent(document: dict[str, Any]) -> None:
    sent = json.dumps(document).encode()
    try:
        payload = encode(parse(sent, 64))
    except RequestRejectedError as error:
        assert error.status == 400
        assert float("inf") in _numbers(document) or float("-inf") in _numbers(document)
    else:
        assert json.loads(payload) == document


def _numbers(value: Any) -> set[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return {number for item in value for number in _numbers(item)}
    return {value} if isinstance(value, float) else set()


@given(
    st.binary(max_size=60)
    | st.text(alphabet='{}[]":,0123456789truefalsn\\ u', max_size=60).map(str.encode)
)
@example(b"\xff\xfe{\x00}\x00")
@example(b"\xef\xbb\xbf{}")
@example(b"{} {}")
@example(b"")
def test_any_bytes_are_one_object_or_rejected(body: bytes) -> None:
    try:
        document = parse(body, DEPTH)
        payload = encode(document)
    except RequestRejectedError as error:
        assert error.status == 400
    else:
        assert json.loads(payload) == document == json.loads(body)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"[]", "JSON list; expected an object"),
        (b"null", "expected an object"),
        (b'{"model": "a"', "not JSON"),
        (b"{'model': 'a'}", "not JSON"),
        (b'{"model": "a"} x', "not JSON"),
        (b'{"t": NaN}', "NaN is not a JSON value"),
        (b'{"t": -Infinity}', "-Infinity is not a JSON value"),
        (b'{"t": 1e999}', "out of range"),
        (b'{"t": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"\\udfff": 1}', "surrogate"),
        (b'{"model": "\xff"}', "not UTF-8: byte 11"),
        (b'{"model": "a\x00"}', "not JSON: it holds a NUL"),
        ('{"model": "a"}'.encode("utf-16"), "not UTF-8"),
        ('{"model": "a"}'.encode("utf-16-le"), "not JSON"),
        ('{"model": "a"}'.encode("utf-8-sig"), "not JSON"),
        (b"[" * 100_000, "nests deeper"),
        (b'{"a":' * 100_000, "nests deeper"),
        (b'{"a": ' + b"[" * 8 + b"]" * 8 + b"}", "nests deeper than 8"),
    ],
)
def test_rejected_bodies_and_their_reasons(body: bytes, words: str) -> None:
    rejected(body, words)


def test_the_deepest_body_that_is_taken() -> None:
    body = b'{"a": ' + b"[" * 7 + b"]" * 7 + b"}"
    assert parse(body, DEPTH) == json.loads(body)
    braces = json.dumps({"prompt": "{[" * 1000}).encode()
    assert parse(braces, DEPTH) == json.loads(braces)


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (b'{"model": "mine", "model": "yours"}', "model"),
        (b'{"model": "mine", "\\u006dodel": "yours"}', "model"),
        (b'{"a": 1, "b": 2, "a": 1}', "a"),
        (b'{"a": {"b": [{"c": 1, "c": 2}]}}', "c"),
    ],
)
def test_a_key_named_twice(body: bytes, name: str) -> None:
    assert rejected(body, f"{name!r} twice").param == name


@pytest.mark.parametrize(
    "body", [b'{"\\ud800": 1, "\\ud800": 2}', b'{"a": {"\\udfff": 1, "\\udfff": 2}}']
)
def test_a_duplicate_key_that_is_an_unpaired_surrogate_can_be_reported(body: bytes) -> None:
    error = rejected(body, "twice")
    response = error_response(error.status, str(error), param=error.param)
    assert json.loads(bytes(response.body))["error"]["param"] in (r"\ud800", r"\udfff")


class CountedName(str):
    """A name that counts how often it is hashed."""

    hashed = 0

    def __hash__(self) -> int:
        CountedName.hashed += 1
        return super().__hash__()


@pytest.mark.parametrize("length", [1000, 8000])
def test_a_late_name_twice_is_found_in_one_pass(length: int) -> None:
    names = [CountedName(f"k{n}") for n in range(length)]
    CountedName.hashed = 0
    with pytest.raises(RequestRejectedError, match=f"'k{length - 1}' twice"):
        bodies._unique([(name, 0) for name in [*names, names[-1]]])
    # Once for the object, and twice for the search: once looked up, once added.
    assert CountedName.hashed <= 3 * (length + 1)


def limited(text: str, members: int, values: int) -> bool:
    """True if `check_size` rejects it."""
    try:
        check_size(text.encode(), max_members=members, max_values=values)
    except RequestRejectedError as error:
        assert error.status == 400 and "send less in one request" in str(error)
        return True
    return False


@pytest.mark.parametrize("kind", ["member", "object", "list", "value", "string", "key"])
def test_a_body_of_too_many_values_is_not_parsed(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def text(count: int) -> str:
        if kind in ("member", "key"):
            value = "0" if kind == "member" else '{"":0}'
            return json.dumps({f"k{n}": 0 for n in range(count)}).replace(" 0", value)
        one = {"object": "{}", "list": "[]", "value": "0", "string": '"x"'}[kind]
        return '{"x":[' + ",".join([one] * count) + "]}"

    assert parse(text(8).encode(), 4, max_members=20, max_values=20)

    class Unreachable:
        @staticmethod
        def decode(text: str) -> None:
            raise AssertionError("a body over the limit was parsed")

    monkeypatch.setattr(bodies, "_DECODER", Unreachable)
    with pytest.raises(
        RequestRejectedError, match="more than 20 objects and lists, 20 members of objects or"
    ):
        parse(text(21).encode(), 4, max_members=20, max_values=20)


def test_the_middlewares_limits_apply_to_request_bodies() -> None:
    assert parse(json.dumps({"prompt": [7] * 200_000}).encode(), 4)
    with pytest.raises(RequestRejectedError, match="more than 100000 objects and lists"):
        parse(b'{"x":[' + b"[]," * 100_000 + b"0]}", 4)
    with pytest.raises(RequestRejectedError, match="or 1000000 values"):
        parse(b'{"x":[' + b"1," * 1_000_000 + b"0]}", 4)


@given(st.dictionaries(st.text(), values, max_size=4), st.booleans())
def test_values_are_counted_outside_of_strings_alone(document: dict[str, Any], ascii: bool) -> None:
    text = json.dumps(document, ensure_ascii=ascii, separators=(",", ":"))
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    opened, members, values = _counted(document)
    largest = max(opened, members)
    slack = opened  # An empty object or list counts as one that holds a value.
    assert not limited(text, largest, values + slack)
    assert limited(text, largest - 1, values + slack)
    assert limited(text, largest, values - 1)


def _counted(value: Any) -> tuple[int, int, int]:
    """(objects and lists, members of objects, values in objects and lists)."""
    if not isinstance(value, dict | list):
        return 0, 0, 0
    inner = list(value.values()) if isinstance(value, dict) else value
    sums = [sum(column) for column in zip(*map(_counted, inner), strict=True)] or [0, 0, 0]
    members = len(value) if isinstance(value, dict) else 0
    return 1 + sums[0], members + sums[1], len(inner) + sums[2]


def test_strings_may_contain_json_syntax_beyond_the_limits() -> None:
    words = {"prompt": '{"a": [1, 2], "b\\": "\\\\"}' * 1000, "suffix": "\\"}
    assert parse(json.dumps(words).encode(), 4, max_members=10, max_values=10) == words


def test_a_body_in_pieces() -> None:
    receive = receive_of(part(b'{"a"', True), part(b"", True), part(b": 1}"))
    assert asyncio.run(read_body(JSON, receive, 100)) == b'{"a": 1}'


def test_a_client_that_disconnects_before_its_body_is_complete() -> None:
    receive = receive_of(part(b'{"a"', True), {"type": "http.disconnect"})
    assert asyncio.run(read_body(JSON, receive, 100)) is None


@pytest.mark.parametrize("announced", [b"101", b"9" * 300])
def test_a_large_content_length_is_rejected_before_reading(announced: bytes) -> None:
    with pytest.raises(RequestRejectedError) as caught:
        asyncio.run(read_body([*JSON, (b"content-length", announced)], receive_of(), 100))
    assert caught.value.status == 413


def test_a_large_body_without_content_length_is_rejected_while_reading() -> None:
    receive = receive_of(part(b"x" * 60, True), part(b"x" * 41, True))
    with pytest.raises(RequestRejectedError) as caught:
        asyncio.run(read_body(JSON, receive, 100))
    assert caught.value.status == 413
    whole = receive_of(part(b"x" * 60, True), part(b"x" * 40))
    assert len(asyncio.run(read_body(JSON, whole, 100)) or b"") == 100


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([], 415),
        ([(b"content-type", b"text/plain")], 415),
        ([(b"content-type", b"application/jsonp")], 415),
        ([(b"content-type", b"multipart/form-data; boundary=x")], 415),
        ([*JSON, (b"content-type", b"text/plain")], 415),
        ([(b"content-type", b"application/json; charset=utf-16")], 400),
        ([(b"content-type", b"application/json;charset=latin-1")], 400),
        ([*JSON, (b"content-encoding", b"gzip")], 400),
        ([*JSON, (b"content-encoding", b"identity"), (b"content-encoding", b"br")], 400),
    ],
)
def test_headers_that_promise_no_plain_json(headers: Any, status: int) -> None:
    with pytest.raises(RequestRejectedError) as caught:
        asyncio.run(read_body(headers, receive_of(part(b"{}")), 100))
    assert caught.value.status == status


@pytest.mark.parametrize(
    "kind",
    [
        b"application/json",
        b"Application/JSON",
        b"application/json; charset=UTF-8",
        b'application/json; charset="utf-8"',
        b"application/json; x=y",
    ],
)
def test_headers_that_are_plain_json(kind: bytes) -> None:
    headers = [(b"content-type", kind), (b"content-encoding", b"identity")]
    assert asyncio.run(read_body(headers, receive_of(part(b"{}")), 100)) == b"{}"


def test_the_forwarded_headers_describe_the_forwarded_body() -> None:
    sent = [
        (b"host", b"h"),
        (b"content-length", b"999"),
        (b"transfer-encoding", b"chunked"),
        (b"content-type", b"application/json; charset=utf-8"),
        (b"x-request-id", b"7"),
        (b"x-vllm-priority", b"-1"),
    ]
    assert headers_for(sent, b"{}") == [
        (b"host", b"h"),
        (b"x-request-id", b"7"),
        (b"content-type", b"application/json"),
        (b"content-length", b"2"),
    ]


def test_replay_returns_the_payload_once_and_then_the_servers_messages() -> None:
    async def three() -> list[Message]:
        receive = replay(b"{}", receive_of({"type": "http.disconnect"}))
        return [await receive(), await receive()]

    assert asyncio.run(three()) == [part(b"{}"), {"type": "http.disconnect"}]
