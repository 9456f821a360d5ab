"""SageMaker's routes on vLLM's server, with the same guarantees as vLLM's own routes.

- POST /invocations is served by the model that its body or its header names. vLLM overwrites the
  body's `model` with a header's value, and so with nothing where there is no such header.
- POST /adapters behaves as POST /v1/load_lora_adapter does. With a registry neither it nor
  DELETE /adapters/{name} loads or unloads anything: ids and names are the registry's.
  Both require --api-key where there is one, as vLLM's key guards other paths only.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable, Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, Field, ValidationError
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from safegene_server.access.body import HeaderList, replay
from safegene_server.access.rejection import RequestRejectedError, reject
from safegene_server.access.route_permissions import route_path
from safegene_server.engine_routes import LoadBody, publish
from safegene_server.error_responses import error_response
from safegene_server.server_state import ServerState

INVOCATIONS = "/invocations"
ADAPTERS = "/adapters"
ADAPTER_HEADER = "X-Amzn-SageMaker-Adapter-Identifier"
ALIAS_HEADER = "X-Amzn-SageMaker-Adapter-Alias"
SHOWN_CHARACTERS = 200
REGISTRY_LOADS = (
    "this server's adapters are its registry's: add a tenant with POST /v1/safegene/tenants or "
    "`safegene tenant add`, and remove one with `safegene tenant retire`."
)


class Invocations:
    """ASGI app around the route that puts the body's `model` in the header vLLM's decorator reads.

    Without a family every request passes unchanged. It wraps the route and not the app, so that
    other requests cost nothing more and no other spelling of the path bypasses it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state: ServerState = scope["app"].state.safegene
        if state.verifier is None:
            await self.app(scope, receive, send)
            return
        try:
            payload = await Request(scope, receive).body()
        except ClientDisconnect:
            return
        try:
            headers = header_with_model(list(scope["headers"]), payload)
        except RequestRejectedError as error:
            await reject(error, scope, receive, send)
            return
        await self.app({**scope, "headers": headers}, replay(payload, receive), send)


def header_with_model(headers: HeaderList, payload: bytes) -> HeaderList:
    """Return the headers with the name that body and header agree on; unchanged without a name.

    The body is parsed as vLLM parses it, so both find the same `model`.
    Errors: RequestRejectedError, 400, for a body that is no JSON object, a `model` that is no name
    or does not fit into a header, and two different names.
    """
    try:
        document = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise RequestRejectedError(400, f"the body is not JSON: {error}.") from None
    if not isinstance(document, dict):
        raise RequestRejectedError(
            400, f"the body is a JSON {type(document).__name__}; expected an object."
        )
    in_body = document.get("model")
    if in_body is not None and not isinstance(in_body, str):
        found = type(in_body).__name__
        raise RequestRejectedError(400, f"`model` is a {found}; expected a string.", param="model")
    key = ADAPTER_HEADER.lower().encode()
    sent = [value.decode("latin-1") for name, value in headers if name.lower() == key]
    names = list(dict.fromkeys(name for name in (in_body, *sent) if name))
    if not names:
        return headers
    if len(names) > 1:
        raise RequestRejectedError(
            400,
            f"the request names {_shown(names)}: `model` and the header {ADAPTER_HEADER} must "
            "agree; send one of them, or the same name in both.",
            param="model",
        )
    try:
        value = names[0].encode("latin-1")
    except UnicodeEncodeError:
        raise RequestRejectedError(
            400,
            f"{_shown(names)} has characters that no header can carry, and this route passes the "
            "name on in one; use /v1/chat/completions or /v1/completions.",
            param="model",
        ) from None
    return [*((name, other) for name, other in headers if name.lower() != key), (key, value)]


def _shown(names: Iterable[str]) -> str:
    return " and ".join(repr(name[:SHOWN_CHARACTERS]) for name in names)


def guard_invocations(app: FastAPI) -> None:
    """Wrap vLLM's own route in `Invocations`; a custom handler of the operator is left as it is."""
    for route in _leaves(app.router.routes):
        methods = getattr(route, "methods", None) or ()
        if getattr(route, "path", None) == INVOCATIONS and "POST" in methods:
            route.app = Invocations(route.app)


def _leaves(routes: Iterable[Any]) -> Iterable[Any]:
    """Iterate over all routes, also those of included routers."""
    for route in routes:
        inner = getattr(route, "routes", None)
        yield from _leaves(inner) if inner else (route,)


class AdapterBody(BaseModel):
    """Body of POST /adapters; further fields are ignored, as in SageMaker's standard."""

    name: str = Field(min_length=1)
    src: str = Field(min_length=1)


async def register_adapter(request: Request) -> Response:
    """POST /adapters: load an adapter as POST /v1/load_lora_adapter does.

    Without a JSON body the query's parameters are taken, as in vLLM.
    """
    try:
        content: Any = await request.json()
    except (ValueError, RecursionError):
        content = dict(request.query_params)
    try:
        body = AdapterBody.model_validate(content)
    except ValidationError as error:
        problems = [(".".join(map(str, one["loc"])), one["msg"]) for one in error.errors()]
        message = "; ".join(f"{field or 'body'}: {text}" for field, text in problems)
        return error_response(400, message, param=problems[0][0] or None)
    response = await publish(
        request.app.state.openai_serving_models,
        LoadBody(lora_name=body.name, lora_path=body.src),
        param="src",
    )
    if response.status_code != 200:
        return response
    shown = request.headers.get(ALIAS_HEADER) or body.name
    return PlainTextResponse(f"Adapter {shown} registered")


async def reject_with_registry(request: Request) -> Response:
    """404 for what only a server without a registry offers."""
    return error_response(404, REGISTRY_LOADS)


def replace_adapter_routes(app: FastAPI, *, registry: bool) -> None:
    """Take the place of the routes that vLLM adds for SageMaker after attaching plugins.

    vLLM drops FastAPI's routes of the same path before it adds its own, but not Starlette's, and
    the first match serves the request. DELETE stays vLLM's without a registry.
    """
    post = reject_with_registry if registry else register_adapter
    app.router.routes.append(Route(ADAPTERS, post, methods=["POST"]))
    if registry:
        path = f"{ADAPTERS}/{{adapter_name}}"
        app.router.routes.append(Route(path, reject_with_registry, methods=["DELETE"]))


class AdapterKeyMiddleware:
    """ASGI middleware that requires one of the server's API keys on SageMaker's adapter routes."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app = app
        self.digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._guarded(scope) and not self._known(scope):
            response = error_response(401, "this route needs the server's API key.")
            await response(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    @staticmethod
    def _guarded(scope: Scope) -> bool:
        # A router's pattern also matches a path that ends in a line feed.
        first = route_path(scope).strip("/\n").split("/")[0]
        return first == "adapters" and scope["method"] != "OPTIONS"

    def _known(self, scope: Scope) -> bool:
        kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.encode()).digest()
        matches = [secrets.compare_digest(digest, known) for known in self.digests]
        return kind.lower() == "bearer" and any(matches)
