"""Exchanges with a server's /v1/safegene: addresses, authentication, errors, retries, polling.

No input or output happens here: an exchange is a generator that yields the requests to send and
the seconds to pause, and is sent the responses (see Client).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Generator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import httpx
from pydantic import ValidationError

from safegene_vllm.client import routes
from safegene_vllm.client.routes import Call
from safegene_vllm.client.schemas import ENDED, Job, Rollout, Schema
from safegene_vllm.errors import ApiError, ConfigError

T = TypeVar("T")
_Polled = TypeVar("_Polled", Job, Rollout)
Exchange = Generator[httpx.Request | float, httpx.Response | None, T]

PREFIX = "/v1/safegene"
TIMEOUT_S = 60.0
ATTEMPTS = 4
FIRST_PAUSE_S = 0.5
MAX_PAUSE_S = 30.0
"""Longest `Retry-After` that is honored; for a longer one the error is raised at once."""

POLL_S = 0.5
PATIENCE_S = 60.0
"""Seconds for which a polled server may be down, as during a restart."""

_BUSY = {429, 503}
_DOWN = {502, 503, 504}
_ADVICE = {
    401: "is the key complete and still valid?",
    403: "a key with another scope is needed",
}


class Connection:
    """Builds requests with the key, and retries a 429 or 503 with `Retry-After`.

    GET requests are also retried on any 502, 503 or 504; changes are not.
    """

    def __init__(
        self, base_url: str, key: str | None, *, attempts: int, first_pause_s: float
    ) -> None:
        self.url = service_url(base_url)
        if key is not None and not re.fullmatch(r"[\x21-\x7e]+", key):
            raise ConfigError("the key is empty or not one line of visible ASCII; check its source")
        if attempts < 1:
            raise ConfigError(f"attempts = {attempts}, expected at least 1")
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._attempts = attempts
        self._first_pause_s = first_pause_s

    def exchange(self, call: Call[T]) -> Exchange[T]:
        """Carry out a call and return its result, of a list all pages. Errors: ApiError."""
        if not call.paged:
            found: T = self._parsed(call, (yield from self._request(call, call.query)))
            return found
        items: list[Any] = []
        cursor: Any = None
        while True:
            page = yield from self._request(call, {**call.query, "cursor": cursor})
            rows = page.get("data")
            if not isinstance(rows, list):
                raise self._unexpected("a list")
            items += (self._parsed(call, row) for row in rows)
            before, cursor = cursor, page.get("cursor")
            if cursor is None or cursor == before:
                return cast(T, items)

    def _request(
        self, call: Call[Any], query: Mapping[str, str | int | None]
    ) -> Exchange[dict[str, Any]]:
        given = {name: value for name, value in query.items() if value is not None}
        content = None if call.body is None else _encoded(call.body)
        headers = {} if call.body is None else {"Content-Type": "application/json"}
        url = self.url + call.path
        for attempt in range(self._attempts):
            try:
                reply = yield httpx.Request(
                    call.method,
                    url,
                    params=given,
                    content=content,
                    headers={**self._headers, **headers},
                )
            except httpx.RequestError as error:
                raise ApiError(
                    f"{self.url} does not respond: {type(error).__name__}: {error}",
                    advice="check the address, and that the server is up",
                ) from error
            assert isinstance(reply, httpx.Response)
            if reply.is_success:
                return self._object_in(reply)
            rejection = self._error_in(reply)
            after_s = rejection.retry_after_s
            pause_s = self._first_pause_s * 2**attempt if after_s is None else after_s
            invited = reply.status_code in _BUSY and after_s is not None
            again = invited or (call.method == "GET" and reply.status_code in _DOWN)
            if not again or attempt + 1 == self._attempts or pause_s > MAX_PAUSE_S:
                raise rejection
            yield pause_s
        raise AssertionError("the last attempt returns or raises")

    def _parsed(self, call: Call[Any], found: Any) -> Any:
        if not (isinstance(call.item, type) and issubclass(call.item, Schema)):
            return found
        try:
            return call.item.model_validate(found, extra="allow")
        except ValidationError as error:
            where = ".".join(str(part) for part in error.errors()[0]["loc"])
            raise ApiError(
                f"{self.url}{call.path} responded with another {call.item.__name__} than expected: "
                f"{where}: {error.errors()[0]['msg']}",
                advice="does the server run another release than this client?",
            ) from error

    def _object_in(self, reply: httpx.Response) -> dict[str, Any]:
        if not reply.content:
            return {}
        found = _json_in(reply)
        if not isinstance(found, dict):
            raise self._unexpected("a JSON object")
        return found

    def _unexpected(self, expected: str) -> ApiError:
        return ApiError(
            f"{self.url} did not respond with {expected}", advice="is this a SafeGene server?"
        )

    def _error_in(self, reply: httpx.Response) -> ApiError:
        status = reply.status_code
        advice = _ADVICE.get(status, "")
        if reply.is_redirect:
            moved = reply.headers.get("location", "nowhere")
            return ApiError(
                f"{self.url} redirects to {moved}", status=status, advice="use that address"
            )
        found = _json_in(reply)
        error = found.get("error") if isinstance(found, dict) else None
        if isinstance(error, dict) and isinstance(error.get("message"), str):
            message, param = error["message"], error.get("param")
        else:
            param = None
            detail = found.get("detail") if isinstance(found, dict) else None
            message = detail if isinstance(detail, str) else reply.text[:200].strip()
        if (status == 404 and message in ("Not Found", "")) or status == 405:
            message = (
                f"{reply.request.method} {reply.request.url.path} is not a route of this server"
            )
            advice = "does this server run SafeGene with a registry, and this release of it?"
        return ApiError(
            message or reply.reason_phrase,
            status=status,
            param=param if isinstance(param, str) else None,
            retry_after_s=_retry_after_s(reply),
            advice=advice,
        )


def wait_job(
    server: Connection,
    id: int,
    *,
    timeout_s: float | None = None,
    poll_s: float = POLL_S,
    patience_s: float = PATIENCE_S,
    seen: Callable[[Job], object] = lambda job: None,
) -> Exchange[Job]:
    """Wait until a job is done, failed or cancelled; `seen` is called after every poll.

    Errors: TimeoutError after `timeout_s`; ApiError if the server is down for `patience_s`, or if
    the number stands for another object since the server's registry was restored.
    """
    return _poll_until_done(
        server,
        routes.job(id),
        lambda job: job.state in ENDED,
        seen,
        f"job {id} has not ended",
        (timeout_s, poll_s, patience_s),
    )


def wait_rollout(
    server: Connection,
    id: int,
    *,
    timeout_s: float | None = None,
    poll_s: float = POLL_S,
    patience_s: float = PATIENCE_S,
    seen: Callable[[Rollout], object] = lambda rollout: None,
) -> Exchange[Rollout]:
    """Wait until every live replica applies a rollout. Errors: as of wait_job."""
    return _poll_until_done(
        server,
        routes.rollout(id),
        lambda rollout: rollout.done,
        seen,
        f"rollout {id} is not applied by every live replica",
        (timeout_s, poll_s, patience_s),
    )


def _poll_until_done(
    server: Connection,
    call: Call[_Polled],
    ended: Callable[[_Polled], bool],
    seen: Callable[[_Polled], object],
    unfinished: str,
    limits: tuple[float | None, float, float],
) -> Exchange[_Polled]:
    timeout_s, poll_s, patience_s = limits
    began = responded = time.monotonic()
    created_at = None
    while True:
        try:
            found = yield from server.exchange(call)
        except ApiError as error:
            if error.status not in (None, *_DOWN) or time.monotonic() - responded >= patience_s:
                raise
        else:
            responded = time.monotonic()
            created_at = created_at or found.created_at
            if found.created_at != created_at:
                raise ApiError(
                    f"{unfinished}, and its number now stands for another one (created "
                    f"{created_at} and {found.created_at}): the server's registry was restored",
                    advice="list them again",
                )
            seen(found)
            if ended(found):
                return found
        if timeout_s is not None and time.monotonic() - began + poll_s > timeout_s:
            raise TimeoutError(
                f"{unfinished} after {timeout_s:g} s; it continues, check again later"
            )
        yield float(poll_s)


def service_url(given: str) -> str:
    """Base URL of the routes, for a server's address with or without /v1. Errors: ConfigError."""
    try:
        parts = urlsplit(given.strip())
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fits = False
    if fits and "@" in parts.netloc:
        raise ConfigError("the server's address contains a user or password; give the key instead")
    if not fits or parts.query or parts.fragment:
        raise ConfigError(
            f"server address {given!r} is not http(s)://HOST[:PORT]; write for example "
            "http://localhost:8000"
        )
    path = parts.path.rstrip("/").removesuffix(PREFIX).removesuffix("/v1")
    return f"{parts.scheme}://{parts.netloc}{path}{PREFIX}"


def _encoded(body: Mapping[str, Any]) -> bytes:
    given = {name: value for name, value in body.items() if value is not None}
    try:
        return json.dumps(given, allow_nan=False).encode()
    except ValueError as error:
        raise ConfigError(f"a number to send is not finite: {error}") from error


def _json_in(reply: httpx.Response) -> Any:
    try:
        return json.loads(reply.content)
    except (ValueError, RecursionError):
        return None


def _retry_after_s(reply: httpx.Response) -> float | None:
    """Parse `Retry-After`, a number or a date, into seconds; None if it is neither."""
    text = reply.headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,9}", text):
        return float(text)
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return None
    date = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.now(UTC)).total_seconds())
