"""HTTP connection to a server's /v1/safegene: addresses, authentication, errors and retries."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote, urlsplit

import httpx

from safegene_vllm.errors import ApiError, ConfigError

PREFIX = "/v1/safegene"
TIMEOUT_S = 60.0
ATTEMPTS = 4
FIRST_PAUSE_S = 0.5
MAX_PAUSE_S = 30.0
"""Longest `Retry-After` that is honored; for a longer one the error is raised at once."""

_BUSY = {429, 503}
_DOWN = {502, 503, 504}
_ADVICE = {
    401: "is the key complete and still valid?",
    403: "a key with another scope is needed",
}


class Connection:
    """Sends requests with the key, and retries a 429 or 503 with `Retry-After`.

    GET requests are also retried on any 502, 503 or 504; changes are not.
    """

    def __init__(
        self,
        base_url: str,
        key: str | None,
        *,
        timeout_s: float = TIMEOUT_S,
        attempts: int = ATTEMPTS,
        first_pause_s: float = FIRST_PAUSE_S,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = service_url(base_url)
        if key is not None and not re.fullmatch(r"[\x21-\x7e]+", key):
            raise ConfigError("the key is empty or not one line of visible ASCII; check its source")
        self._attempts = attempts
        self._first_pause_s = first_pause_s
        self._http = httpx.Client(
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            timeout=timeout_s,
            transport=transport,
        )

    def close(self) -> None:
        self._http.close()

    def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str | int | None] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the response's object; None values of `query` and `body` are left out.

        Errors: ApiError.
        """
        given = {name: value for name, value in (query or {}).items() if value is not None}
        content = None if body is None else _encoded(body)
        headers = {} if body is None else {"Content-Type": "application/json"}
        for attempt in range(self._attempts):
            try:
                reply = self._http.request(
                    method, self.url + path, params=given, content=content, headers=headers
                )
            except httpx.RequestError as error:
                raise ApiError(
                    f"{self.url} does not respond: {type(error).__name__}: {error}",
                    advice="check the address, and that the server is up",
                ) from error
            if reply.is_success:
                return self._object_in(reply)
            rejection = self._error_in(reply)
            after_s = rejection.retry_after_s
            pause_s = self._first_pause_s * 2**attempt if after_s is None else after_s
            invited = reply.status_code in _BUSY and after_s is not None
            again = invited or (method == "GET" and reply.status_code in _DOWN)
            if not again or attempt + 1 == self._attempts or pause_s > MAX_PAUSE_S:
                raise rejection
            time.sleep(pause_s)
        raise ConfigError(f"attempts = {self._attempts}, expected at least 1")

    def listed(
        self, path: str, query: Mapping[str, str | int | None] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Iterate over all items of a list, page by page. Errors: ApiError."""
        cursor: Any = None
        while True:
            page = self.request("GET", path, query={**(query or {}), "cursor": cursor})
            items = page.get("data")
            if not isinstance(items, list):
                raise self._unexpected("a list")
            yield from items
            before, cursor = cursor, page.get("cursor")
            if cursor is None or cursor == before:
                return

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


def tenant_path(name: str) -> str:
    """Quote a tenant's name, which may contain slashes, for a path. Errors: ConfigError."""
    return "/".join(part_of_path(part, name) for part in name.split("/"))


def part_of_path(name: str, whole: str | None = None) -> str:
    """Quote a name as one segment of a path; `.` and `..` are rejected. Errors: ConfigError."""
    if name in ("", ".", ".."):
        raise ConfigError(f"{name if whole is None else whole!r} is not a valid name")
    return quote(name, safe="")


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
