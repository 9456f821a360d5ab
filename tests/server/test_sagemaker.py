"""SageMaker's routes: which name reaches vLLM's decorator, and the responses of /adapters.

vLLM's own route is stood in for by one that reads the header as the decorator does. What the real
one does with it is in test_server_model_choice.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from starlette.applications import Starlette
from starlette.routing import Mount, Route

from safegene_server.access.rejection import RequestRejectedError
from safegene_server.sagemaker import (
    ADAPTER_HEADER,
    AdapterKeyMiddleware,
    guard_invocations,
    header_with_model,
    replace_adapter_routes,
)

KEY = ADAPTER_HEADER.lower().encode()
SENT = (b"accept", b"*/*")


def named(model: Any, *sent: str) -> str | None:
    """The name that vLLM's decorator finds; nothing else of the headers may change."""
    headers = [SENT, *((KEY, name.encode()) for name in sent)]
    document = {"prompt": "x"} if model is None else {"prompt": "x", "model": model}
    found = header_with_model(headers, json.dumps(document).encode())
    assert SENT in found and {name for name, _ in found} <= {SENT[0], KEY}
    names = [value.decode("latin-1") for name, value in found if name == KEY]
    assert len(names) < 2
    return names[0] if names else None


@pytest.mark.parametrize(
    ("model", "sent", "found"),
    [
        ("t0", (), "t0"),
        ("acme/support@7", (), "acme/support@7"),
        ("é", (), "é"),
        (None, ("t0",), "t0"),
        ("", ("t0",), "t0"),
        ("t0", ("",), "t0"),
        ("t0", ("t0",), "t0"),
        ("t0", ("t0", "t0"), "t0"),
        (None, (), None),
        ("", (), None),
    ],
)
def test_the_one_name_of_body_and_header(
    model: str | None, sent: tuple[str, ...], found: str | None
) -> None:
    assert named(model, *sent) == found


@pytest.mark.parametrize(
    ("model", "sent", "words"),
    [
        ("t0", ("t1",), "'t0' and 't1'"),
        ("base", ("t1",), "must agree"),
        (None, ("t0", "t1"), "must agree"),
        ("t0 ", ("t0",), "must agree"),
        ("T0", ("t0",), "must agree"),
        (5, (), "`model` is a int"),
        (["t0"], (), "`model` is a list"),
        (False, ("t0",), "`model` is a bool"),
        ("名", (), "no header can carry"),
        ("\ud800", (), "no header can carry"),
    ],
)
def test_names_that_are_rejected(model: Any, sent: tuple[str, ...], words: str) -> None:
    with pytest.raises(RequestRejectedError, match=words) as rejected:
        named(model, *sent)
    assert (rejected.value.status, rejected.value.param) == (400, "model")
    assert len(str(rejected.value)) < 1000


def test_a_long_name_is_shortened_in_the_error() -> None:
    with pytest.raises(RequestRejectedError) as rejected:
        named("x" * 100_000, "y" * 100_000)
    assert len(str(rejected.value)) < 1000


@pytest.mark.parametrize(
    "payload", [b"", b"{", b"[]", b'"t0"', b"\xff", b"[" * 100_000, b"1" * 5000]
)
def test_bodies_that_are_rejected(payload: bytes) -> None:
    with pytest.raises(RequestRejectedError) as rejected:
        header_with_model([], payload)
    assert rejected.value.status == 400


def test_of_a_name_given_twice_the_last_counts_as_for_vllm() -> None:
    payload = b'{"model": "t0", "model": "t1"}'
    assert json.loads(payload)["model"] == "t1"
    assert header_with_model([], payload) == [(KEY, b"t1")]


def app_with_invocations(*, family: bool = True) -> FastAPI:
    app = FastAPI()

    @app.post("/invocations")
    async def invocations(request: Request) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(await request.body())
        body["model"] = request.headers.get(ADAPTER_HEADER)
        return body

    guard_invocations(app)
    app.state.safegene = SimpleNamespace(verifier=object() if family else None)
    return app


def test_the_route_receives_the_name_and_the_whole_body() -> None:
    client = TestClient(app_with_invocations())
    sent = {"model": "t0", "prompt": "ü" * 100_000}
    assert client.post("/invocations", json=sent).json() == sent
    response = client.post("/invocations", json=sent, headers={ADAPTER_HEADER: "t1"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "model"


@pytest.mark.parametrize("path", ["/invocations%0A", "/invocations/"])
def test_other_spellings_of_the_path_are_held_to_the_same(path: str) -> None:
    client = TestClient(app_with_invocations())
    assert client.post(path, json={"model": "t0"}).json()["model"] == "t0"


def test_without_a_family_nothing_changes() -> None:
    client = TestClient(app_with_invocations(family=False))
    assert client.post("/invocations", json={"model": "t0"}).json()["model"] is None


def test_a_route_of_an_included_router_is_found() -> None:
    async def invocations(request: Request) -> Any:
        raise AssertionError

    inner = Route("/invocations", invocations, methods=["POST"])
    app: Any = Starlette(routes=[Mount("/", routes=[inner])])
    guard_invocations(app)
    app.state.safegene = SimpleNamespace(verifier=object())
    assert TestClient(app).post("/invocations", content=b"{").status_code == 400


@pytest.mark.parametrize(
    ("root_path", "path"),
    [("", "/adapters"), ("", "/adapters%0A"), ("/ad", "/adapters"), ("/x", "/x/adapters")],
)
def test_no_spelling_of_the_path_bypasses_the_key(root_path: str, path: str) -> None:
    app = FastAPI(root_path=root_path)
    app.state.openai_serving_models = SimpleNamespace()
    replace_adapter_routes(app, registry=False)
    app.add_middleware(AdapterKeyMiddleware, keys=["k"])
    client = TestClient(app)
    assert client.post(path, json={}).status_code == 401
    assert client.post(path, json={}, headers={"Authorization": "Bearer k"}).status_code == 400


def test_with_a_registry_nothing_loads_or_unloads() -> None:
    app = FastAPI()
    replace_adapter_routes(app, registry=True)
    client = TestClient(app)
    for response in (
        client.post("/adapters", json={"name": "x", "src": "/x"}),
        client.delete("/adapters/x"),
    ):
        assert response.status_code == 404
        assert "safegene tenant" in response.json()["error"]["message"]
