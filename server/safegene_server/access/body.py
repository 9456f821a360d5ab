"""JSON bodies that name a model: read once, parsed strictly, and re-encoded for the app.

The app gets the re-encoded body, so that no second parser can read it differently. Other bodies
pass unread, with a limit on their size.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import Message, Receive

from safegene_server.access.rejection import RequestRejectedError

HeaderList = list[tuple[bytes, bytes]]
MAX_MEMBERS = 100_000
"""Maximum number of members of objects, and of objects and lists, in one body: each costs far more
memory than its bytes. A long conversation has some thousands."""
MAX_VALUES = 1_000_000
"""Maximum number of values in one body: as many token ids as the longest context holds."""
_REPLACED = {b"content-length", b"content-type", b"transfer-encoding", b"x-vllm-priority"}
"""Headers that are not passed on: the body's own, and vLLM's priority, which the body may set."""


async def read_body(headers: HeaderList, receive: Receive, limit_bytes: int) -> bytes | None:
    """Read the whole body; return None if the client disconnected before it was sent.

    Errors: RequestRejectedError, 413 over the limit, 415 or 400 for headers of other than plain
    JSON.
    """
    _check_headers(headers)
    _check_content_length(headers, limit_bytes)
    whole = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        whole += message.get("body", b"")
        if len(whole) > limit_bytes:
            raise _too_large(limit_bytes)
        if not message.get("more_body", False):
            return bytes(whole)


def limit_body(headers: HeaderList, receive: Receive, limit_bytes: int) -> Receive:
    """Wrap `receive` for an app that reads the body: over the limit it raises HTTPException, 413.

    Errors: RequestRejectedError, 413 for a larger content-length.
    """
    _check_content_length(headers, limit_bytes)
    read_bytes = 0

    async def counted() -> Message:
        nonlocal read_bytes
        message = await receive()
        read_bytes += len(message.get("body", b""))
        if read_bytes > limit_bytes:
            # FastAPI passes on this class; it would turn any other into a 400.
            raise HTTPException(413, str(_too_large(limit_bytes)))
        return message

    return counted


def check_size(body: bytes, *, max_members: int = MAX_MEMBERS, max_values: int = MAX_VALUES) -> str:
    """Return the text of a JSON body, counting its values before any of them is built.

    Exact for JSON; for other text, exact up to where it stops being JSON, beyond which a parser
    builds nothing. Errors: RequestRejectedError, 400.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"the body is not UTF-8: byte {error.start} cannot be read."
        raise RequestRejectedError(400, message) from None
    if "\0" in text:
        # Parsers that guess the encoding would read it as UTF-16, in which nothing was counted.
        raise RequestRejectedError(400, "the body is not JSON: it holds a NUL character.")
    if not _exceeds(text, max_members, max_values):
        return text
    quoted = text.replace("\\\\", "").replace('\\"', "")
    strings = (quoted.count('"') + 1) // 2
    # Every second part lies between two strings. Too many strings are not even split.
    exceeds = strings > max_members + max_values or _exceeds(
        "".join(quoted.split('"')[::2]), max_members, max_values
    )
    if exceeds:
        raise RequestRejectedError(
            400,
            f"the body holds more than {max_members} objects and lists, {max_members} members of "
            f"objects or {max_values} values; send less in one request.",
        )
    return text


def parse(
    body: bytes, max_depth: int, *, max_members: int = MAX_MEMBERS, max_values: int = MAX_VALUES
) -> dict[str, Any]:
    """Parse the body, one JSON object.

    Errors: RequestRejectedError, 400 for what is not UTF-8, not JSON (NaN is not), not an object,
    nested deeper than `max_depth`, too many members or values, or a duplicate key.
    """
    text = check_size(body, max_members=max_members, max_values=max_values)
    try:
        document = _DECODER.decode(text)
    except RecursionError:
        raise _too_deep(max_depth) from None
    except ValueError as error:
        raise RequestRejectedError(400, f"the body is not JSON: {error}.") from None
    if not isinstance(document, dict):
        raise RequestRejectedError(
            400, f"the body is a JSON {type(document).__name__}; expected an object."
        )
    if text.count("{") + text.count("[") > max_depth and _deeper_than(document, max_depth):
        raise _too_deep(max_depth)
    return document


def encode(document: dict[str, Any]) -> bytes:
    """Encode as compact UTF-8.

    Errors: RequestRejectedError, 400 for numbers and characters that have no JSON or UTF-8.
    """
    try:
        return _ENCODER.encode(document).encode("utf-8")
    except UnicodeEncodeError:
        raise RequestRejectedError(
            400, "the body holds half of a surrogate pair; send whole text."
        ) from None
    except ValueError as error:
        raise RequestRejectedError(400, f"the body holds a number out of range: {error}.") from None


def headers_for(headers: HeaderList, payload: bytes) -> HeaderList:
    """Return the request's headers with the re-encoded body's own type and length."""
    return [
        *((name, value) for name, value in headers if name not in _REPLACED),
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(payload)),
    ]


def replay(payload: bytes, receive: Receive) -> Receive:
    """Return a `receive` of the payload as the body, and afterwards of the server's messages."""
    pending: list[Message] = [{"type": "http.request", "body": payload, "more_body": False}]

    async def replayed() -> Message:
        return pending.pop() if pending else await receive()

    return replayed


def _check_content_length(headers: HeaderList, limit_bytes: int) -> None:
    lengths = _values(headers, b"content-length")
    if lengths and lengths[0].isdigit() and int(lengths[0][:20]) > limit_bytes:
        raise _too_large(limit_bytes)


def _check_headers(headers: HeaderList) -> None:
    encodings = [value for value in _values(headers, b"content-encoding") if value != b"identity"]
    if encodings:
        raise RequestRejectedError(
            400, f"content encoding {_shown(encodings[0])}; send the body as it is."
        )
    types = _values(headers, b"content-type")
    kind, _, rest = (types[0] if len(types) == 1 else b"").partition(b";")
    if kind.strip() != b"application/json":
        found = _shown(b", ".join(types))
        raise RequestRejectedError(415, f"content type {found}; expected application/json.")
    for parameter in rest.split(b";"):
        name, _, value = parameter.strip().partition(b"=")
        if name == b"charset" and value.strip(b'"') not in (b"utf-8", b"utf8"):
            raise RequestRejectedError(400, f"charset {_shown(value)}; JSON is UTF-8.")


def _values(headers: HeaderList, name: bytes) -> list[bytes]:
    return [value.strip().lower() for key, value in headers if key == name]


def _shown(value: bytes) -> str:
    return repr(value[:100].decode("latin-1"))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                shown = name[:100]
                raise RequestRejectedError(
                    400, f"the body names {shown!r} twice in one object.", param=shown
                )
            seen.add(name)
    return found


def _exceeds(text: str, max_members: int, max_values: int) -> bool:
    """Return whether a text without strings exceeds a limit; with strings, whether it might."""
    opened = text.count("{") + text.count("[")
    return (
        opened > max_members
        or text.count(":") > max_members
        or opened + text.count(",") > max_values
    )


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def _deeper_than(document: dict[str, Any], limit: int) -> bool:
    """Walk level by level, because a deep body would break a recursive walk."""
    level: Iterable[Any] = [document]
    for _ in range(limit):
        level = [
            child
            for node in level
            for child in (node.values() if type(node) is dict else node)
            if type(child) is dict or type(child) is list
        ]
        if not level:
            return False
    return True


def _too_large(limit_bytes: int) -> RequestRejectedError:
    return RequestRejectedError(413, f"the body is larger than {limit_bytes} bytes.")


def _too_deep(max_depth: int) -> RequestRejectedError:
    return RequestRejectedError(400, f"the body nests deeper than {max_depth} levels.")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)
_ENCODER = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":")
)
