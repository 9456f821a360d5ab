"""OpenAI's error shape, for everything that our routes refuse.

For turning exceptions and messages into `{"error": {message, type, param, code}}`. Not for vLLM's
own routes: those have vLLM's handlers.
"""

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
"""Errors of one body that its response names."""

_WRAPPERS = (
    re.compile(r"^Call to \w+ method failed: "),
    re.compile(r"^Worker failed with error [\"']"),
    re.compile(r"[\"'], please check the stack trace above for the root cause\.?\s*$"),
)


class EngineDownError(Exception):
    """The engine has died or does not answer; nothing can be said about what it serves."""


def error_body(status: int, message: str, *, param: str | None = None) -> dict[str, Any]:
    """The body of an error, its type named as vLLM names it (`BadRequestError`, ...).

    Half of a surrogate pair, which a client's JSON may hold and no UTF-8 can, is shown escaped.
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
    """The message that was raised in a worker, without what the host wrapped around it."""
    message = str(error).partition("\nTraceback (most recent call last)")[0].strip()
    for wrapper in _WRAPPERS:
        message = wrapper.sub("", message)
    return message or type(error).__name__


def status_of(error: BaseException) -> int:
    """404 for what is not there, 409 for a state that forbids it, 503 without engine or registry,
    507 for our own disk, 500 for a broken promise, 400 otherwise."""
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
    """A route whose every error has OpenAI's shape, whatever handlers the app has."""

    async def check(self, request: Request) -> None:
        """Check before the body is parsed; nothing here. Errors: SafegeneError, HTTPException."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            try:
                await self.check(request)
                return await answer(request)
            except RequestValidationError as error:
                return _invalid(error)
            except HTTPException as error:
                return error_response(error.status_code, str(error.detail))
            except (SafegeneError, EngineDownError) as error:
                return error_response(status_of(error), plain(error))
            except Exception:
                logger.exception("%s %s failed", request.method, request.url.path)
                return error_response(500, "SafeGene's route failed; the server's log says why.")

        return guarded


def _invalid(error: RequestValidationError) -> JSONResponse:
    """400 naming the first bad fields of a body; `param` is the first one."""
    found = error.errors()
    faults = [
        (".".join(part for part in fault["loc"][1:] if isinstance(part, str)), fault["msg"])
        for fault in found[:MAX_SHOWN]
    ]
    message = "; ".join(f"{where or 'body'}: {what}" for where, what in faults)
    if len(found) > MAX_SHOWN:
        message += f"; and {len(found) - MAX_SHOWN} more"
    return error_response(400, message, param=(faults[0][0] if faults else None) or None)
