"""A revision as shown to clients: the requested name, and headers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from access_app import CHAT, chat, guarded, rejected, send_request
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from safegene_server.access.limits import Counters
from safegene_server.access.middleware import AccessSettings

TEXT = 'text with "model":"acme@7", "system_fingerprint":null and a \\ in it'


def app_of(make: Any) -> FastAPI:
    app = FastAPI()

    @app.post(CHAT)
    async def response(request: Request) -> Response:
        body = await request.json()
        return make(body["model"], request)

    return app


def completion(model: str, fingerprint: str | None) -> dict[str, Any]:
    return {
        "object": "chat.completion",
        "model": model,
        "choices": [{"message": {"content": TEXT.replace("acme@7", model)}}],
        "system_fingerprint": fingerprint,
    }


def requested(make: Any, **more: Any) -> Any:
    return guarded(app_of(make), settings=AccessSettings(), **more)


@pytest.mark.parametrize(
    ("fingerprint", "expected"), [(None, "acme@7"), ("vllm-0.32.0-0a", "vllm-0.32.0-0a:acme@7")]
)
def test_a_response_names_the_requested_model(fingerprint: str | None, expected: str) -> None:
    access = requested(lambda model, _: JSONResponse(completion(model, fingerprint)))
    response = chat(access, "acme", model="acme")
    found = response.json()
    assert (found["model"], found["system_fingerprint"]) == ("acme", expected)
    assert found["choices"] == completion("acme@7", None)["choices"]
    assert response.headers["x-safegene-revision"] == "acme@7"
    assert int(response.headers["content-length"]) == len(response.content)


def test_the_default_tenant_is_named_by_its_name() -> None:
    access = requested(lambda model, _: JSONResponse(completion(model, None)))
    assert chat(access, "acme").json()["model"] == "acme"


@pytest.mark.parametrize("name", ["acme@7", "acme@6"])
def test_a_requested_revision_stays_its_own_name(name: str) -> None:
    access = requested(lambda model, _: JSONResponse(completion(model, None)))
    response = chat(access, "acme", model=name)
    assert response.json() == completion(name, None)
    assert response.headers["x-safegene-revision"] == name


def test_the_base_model_has_no_revision() -> None:
    access = requested(lambda model, _: JSONResponse(completion(model, None)))
    response = chat(access, "base", model="org/Base")
    assert response.json() == completion("org/Base", None)
    assert "x-safegene-revision" not in response.headers


def test_every_event_of_a_stream_names_the_requested_model() -> None:
    def events(model: str) -> list[bytes]:
        chunks = [completion(model, None), completion(model, "fp"), {"error": {"message": "x"}}]
        return [f"data: {json.dumps(c, separators=(',', ':'))}\n\n".encode() for c in chunks]

    access = requested(
        lambda model, _: StreamingResponse(iter(events(model)), media_type="text/event-stream")
    )
    response = chat(access, "acme", model="acme", stream=True)
    lines = [line for line in response.text.split("\n\n") if line]
    first, second, third = (json.loads(line.removeprefix("data: ")) for line in lines)
    assert (first["model"], first["system_fingerprint"]) == ("acme", "acme@7")
    assert (second["model"], second["system_fingerprint"]) == ("acme", "fp:acme@7")
    assert first["choices"] == completion("acme@7", None)["choices"]
    assert third == {"error": {"message": "x"}}


def test_what_is_no_json_or_an_error_passes_as_it_is() -> None:
    for status, kind in ((200, "application/octet-stream"), (400, "application/json")):
        body = b'{"model":"acme@7"}'
        made = Response(body, status, media_type=kind)
        access = requested(lambda model, _, made=made: made)
        response = chat(access, "acme", model="acme")
        assert (response.status_code, response.content) == (status, body)


def test_the_revision_is_named_where_the_settings_say_so() -> None:
    access = guarded(
        app_of(lambda model, _: JSONResponse(completion(model, None))),
        settings=AccessSettings(response_model="revision"),
    )
    response = chat(access, "acme", model="acme")
    assert response.json() == completion("acme@7", None)
    assert response.headers["x-safegene-revision"] == "acme@7"


@pytest.mark.parametrize(
    ("given", "same"), [("one-1", True), (None, False), ("two words", False), ("x" * 129, False)]
)
def test_every_response_has_a_request_id_which_the_engine_gets_too(
    given: str | None, same: bool
) -> None:
    seen: list[str] = []

    def make(model: str, request: Request) -> Response:
        seen.append(request.headers["x-request-id"])
        return JSONResponse({})

    access = requested(make)
    headers = {} if given is None else {"X-Request-Id": given}
    response = send_request(access, "POST", CHAT, "acme", json={}, headers=headers)
    found = response.headers["x-request-id"]
    assert (found == given) is same and len(found) <= 128
    assert seen == [found]
    denied = send_request(access, "POST", CHAT, json={}, headers=headers)
    rejected(denied, 401)
    assert denied.headers["x-request-id"]


def test_headers_are_exposed_to_scripts_of_another_origin() -> None:
    access = requested(lambda model, _: JSONResponse({}))
    plain = send_request(access, "POST", CHAT, "acme", json={})
    assert "access-control-expose-headers" not in plain.headers
    other = send_request(
        access, "POST", CHAT, "acme", json={}, headers={"Origin": "https://app.example"}
    )
    assert "x-safegene-revision" in other.headers["access-control-expose-headers"]


def test_rate_limits_are_in_the_headers_of_every_response() -> None:
    now = [0.0]
    access = requested(
        lambda model, _: JSONResponse(completion(model, None)), counters=Counters(lambda: now[0])
    )
    left = []
    for _ in range(3):
        response = chat(access, "other", model="other")
        headers = response.headers
        assert headers["x-ratelimit-limit-requests"] == "3"
        assert "x-ratelimit-limit-tokens" not in headers
        left.append((headers["x-ratelimit-remaining-requests"], now[0]))
        assert headers["x-ratelimit-reset-requests"] == "60000ms"
        now[0] += 10
    assert left == [("2", 0.0), ("1", 10.0), ("0", 20.0)]
    denied = chat(access, "other", model="other")
    rejected(denied, 429)
    assert denied.headers["x-ratelimit-remaining-requests"] == "0"
    assert denied.headers["x-ratelimit-reset-requests"] == "50000ms"
    assert denied.headers["retry-after"] == "30"
    assert not [name for name in chat(access, "acme").headers if name.startswith("x-ratelimit")]


@pytest.mark.parametrize(
    ("key", "body", "status", "kind"),
    [
        (None, {}, 401, "authentication_error"),
        ("read", {}, 403, "permission_error"),
        ("acme", {"model": "other"}, 404, "not_found_error"),
        ("acme", {"model": 1}, 400, "invalid_request_error"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_errors_of_anthropics_routes_have_its_shape(
    path: str, key: str | None, body: dict[str, Any], status: int, kind: str
) -> None:
    response = send_request(guarded(), "POST", path, key, json=body)
    assert response.status_code == status
    found = response.json()
    assert set(found) == {"type", "error"} and found["type"] == "error"
    assert found["error"]["type"] == kind and found["error"]["message"]
