"""OpenAI's error shape `{"error": {message, type, param, code}}` for every error of our routes."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Coroutine, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from safegene_vllm.errors import (
    BoundsError,
    ConflictError,
    FrozenError,
    MissingFileError,
    NotFoundError,
    ReceiptError,
    RegistryDownError,
    SafegeneError,
    SchemaError,
    StoreError,
)

logger = logging.getLogger("vllm.safegene_server")
MAX_SHOWN = 20
"""Maximum number of errors of one body that its response names."""

_WRAPPERS = (
    re.compile(r"^Call to \w+ method failed: "),
    re.compile(r"^Worker failed with error [\"']"),
    re.compile(r"[\"'], please check the stack trace above for the root cause\.?\s*$"),
)

_PATH = re.compile(r"(?<![\w:/])/[\w.~-]|:///")
"""An absolute path, or a URL of one; of a remote URL neither."""
_NAMES_NO_PATH = (BoundsError, ConflictError, FrozenError, NotFoundError)
"""Errors that quote names and numbers only, of the request or the registry."""
HIDDEN = "the message of this error names files of the server, so only the server's log shows it."


class EngineDownError(Exception):
    """The engine has died or does not respond, so what it serves is unknown."""


def error_body(status: int, message: str, *, param: str | None = None) -> dict[str, Any]:
    """Make the body of an error, its type named as vLLM names it (`BadRequestError`, ...).

    An unpaired surrogate, which JSON may hold and UTF-8 cannot, is shown escaped.
    """
    message, param = _writable(message), None if param is None else _writable(param)
    name = HTTPStatus(status).phrase.title().replace(" ", "").replace("-", "")
    kind = name if name.endswith("Error") else f"{name}Error"
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    body = error_body(status, message, param=param)
    return JSONResponse(body, status_code=status, headers=headers)


def _writable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def plain(error: BaseException | str) -> str:
    """Return the message raised in a worker, without what vLLM wrapped around it."""
    message = str(error).partition("\nTraceback (most recent call last)")[0].strip()
    for wrapper in _WRAPPERS:
        message = wrapper.sub("", message)
    return message or type(error).__name__


def names_path(text: str) -> bool:
    """Return whether a text names an absolute path."""
    return _PATH.search(text) is not None


def public_message(error: BaseException | str) -> str:
    """Return the message for API keys, without paths of this server; the caller logs the whole.

    An error without a public message of its own is HIDDEN if its message names any path.
    """
    if (public := getattr(error, "public", None)) is not None:
        return plain(public)
    message = plain(error)
    return HIDDEN if names_path(message) and not isinstance(error, _NAMES_NO_PATH) else message


def set_public_name(error: Exception, path: str, name: str) -> None:
    """Give an error a public message that calls `path` by `name`; none if it names other paths."""
    message = plain(error).replace(path, name)
    if isinstance(error, SafegeneError) and error.public is None and not names_path(message):
        error.public = message


def status_of(error: BaseException) -> int:
    """Return the HTTP status of an error.

    404 not found, 409 forbidden by the state, 503 no engine or registry, 507 our own disk, 500 a
    receipt that breaks its promise, 400 otherwise.
    """
    if isinstance(error, MissingFileError | NotFoundError):
        return 404
    if isinstance(error, ConflictError | FrozenError):
        return 409
    if isinstance(error, EngineDownError | RegistryDownError | SchemaError):
        return 503
    if isinstance(error, StoreError):
        return 507
    return 500 if isinstance(error, ReceiptError) else 400


class ErrorRoute(APIRoute):
    """Route whose every error has OpenAI's shape, whatever handlers the app has."""

    async def check(self, request: Request) -> None:
        """Check the request before its body is parsed. Errors: SafegeneError, HTTPException."""

    def message(self, error: SafegeneError | EngineDownError) -> str:
        """Return the message of a response."""
        return plain(error)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            try:
                await self.check(request)
                return await handler(request)
            except RequestValidationError as error:
                return _invalid(error)
            except HTTPException as error:
                return error_response(error.status_code, str(error.detail))
            except (SafegeneError, EngineDownError) as error:
                return error_response(status_of(error), self.message(error))
            except Exception:
                logger.exception("%s %s failed", request.method, request.url.path)
                return error_response(500, "SafeGene's route failed; the server's log says why.")

        return guarded


def _invalid(error: RequestValidationError) -> JSONResponse:
    """Respond 400, naming the first bad fields of a body; `param` is the first one."""
    errors = error.errors()
    shown = [
        (".".join(part for part in one["loc"][1:] if isinstance(part, str)), one["msg"])
        for one in errors[:MAX_SHOWN]
    ]
    message = "; ".join(f"{field or 'body'}: {text}" for field, text in shown)
    if len(errors) > MAX_SHOWN:
        message += f"; and {len(errors) - MAX_SHOWN} more"
    return error_response(400, message, param=(shown[0][0] if shown else None) or None)
