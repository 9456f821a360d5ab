"""Every route of the real server that can generate: the named model responds, or none.

One server without a registry, with all of vLLM's optional routes. The routes are those of the
access check's table, which is held against vLLM's own in test_server_access_vllm: a new one fails
here until it is classified.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import launched_server as servers
import pytest
from launched_server import end, free_port, start, until_serving
from recipe_setup import tiny_chat_model
from reference_engine import reference

from safegene_server.access.route_permissions import RULES
from safegene_server.sagemaker import ADAPTER_HEADER, ALIAS_HEADER
from safegene_vllm import tiny_model

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]

Body = dict[str, Any]
NAMES = ("base", "t0", "t1", "text")
TOKEN_IDS = [5, 9, 33, 77, 101]
GREEDY = {"max_tokens": 6, "temperature": 0}
CHAT = "/v1/chat/completions"
INVOCATIONS = "/invocations"
GENERATE_TOKENS = "/inference/v1/generate"


def messages(content: Any = "hello") -> Body:
    return {"messages": [{"role": "user", "content": content}]}


@dataclass(frozen=True)
class Case:
    """A good body without `model`, and the part of the response that depends on the model.

    `required`: vLLM rejects a request without a name.
    """

    body: Body
    found: Callable[[Any], Any]
    required: bool = False


def first(response: Any) -> Any:
    choice = response["choices"][0]
    return choice["message"]["content"] if "message" in choice else choice["text"]


GENERATING = {
    CHAT: Case({**messages(), **GREEDY}, first),
    "/v1/chat/completions/batch": Case(
        {"messages": [messages()["messages"]], **GREEDY},
        first,
    ),
    "/v1/completions": Case({"prompt": "hello", **GREEDY}, first),
    "/v1/responses": Case(
        {"input": "hello", "max_output_tokens": 6, "temperature": 0},
        lambda response: [part["content"][0]["text"] for part in response["output"]],
    ),
    "/v1/messages": Case(
        {**messages(), **GREEDY}, lambda response: response["content"], required=True
    ),
    "/generative_scoring": Case(
        {"query": "hello", "items": ["a", "b"], "label_token_ids": [5, 9]},
        lambda response: [round(row["score"], 4) for row in response["data"]],
    ),
    GENERATE_TOKENS: Case(
        {"token_ids": TOKEN_IDS, "sampling_params": GREEDY},
        lambda response: response["choices"][0]["token_ids"],
    ),
    INVOCATIONS: Case({**messages(), **GREEDY}, first),
}

TOKENS_ONLY: dict[str, Body] = {
    "/tokenize": {"prompt": "hello"},
    "/detokenize": {"tokens": TOKEN_IDS},
    "/v1/messages/count_tokens": messages(),
    "/v1/completions/derender": {"generate_responses": []},
    "/v1/chat/completions/derender": {
        "generate_response": {
            "request_id": "x",
            "choices": [{"index": 0, "token_ids": TOKEN_IDS}],
        }
    },
}
"""No step of the engine: they are tried with names that are rejected only."""

RENDERING: dict[str, Body] = {
    "/v1/completions/render": {"prompt": "hello", **GREEDY},
    "/v1/chat/completions/render": {**messages(), **GREEDY},
    "/v1/messages/render": {**messages(), **GREEDY},
    "/v1/responses/render": {"input": "hello", "max_output_tokens": 6, "temperature": 0},
}
"""They return the body of a request for tokens, the model's name in it."""

ABSENT = {
    # Of a pooling engine, which is rejected at start.
    *("/pooling", "/classify", "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"),
    *("/v1/embeddings", "/v2/embed"),
    # Of an SDK that is not installed, and of speech models.
    *("/cohere/v2/chat", "/cohere/v2/chat/render"),
    *("/v1/audio/transcriptions", "/v1/audio/translations"),
}
NOT_IMPLEMENTED = {"/v1/systemone"}
"""Not for this architecture."""

ADMINS = {
    *(INVOCATIONS, GENERATE_TOKENS),
    *("/v1/audio/transcriptions", "/v1/audio/translations"),
}
"""Routes that generate and need `admin` on a server with a registry."""


@dataclass(frozen=True)
class Server:
    d: Path
    http: httpx.Client

    def post(self, path: str, body: Any, name: str | None = None, **headers: str) -> httpx.Response:
        body = body if name is None else {**body, "model": name}
        return self.http.post(path, json=body, headers=headers)

    def response(self, path: str, name: str | None, **changes: Any) -> tuple[Any, Any]:
        """The model that responded, and its completion."""
        case = GENERATING[path]
        response = self.post(path, {**case.body, **changes}, name)
        assert response.status_code == 200, (path, name, response.text)
        return response.json()["model"], case.found(response.json())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    d = tmp_path_factory.mktemp("names")
    tiny_chat_model(d / "m")
    family = tiny_model.write_family(d / "m", d / "f")
    for seed, name in enumerate((*NAMES[1:], "late", "outside")):
        root = d / "root" if name != "outside" else d
        tiny_model.write_tenant(d / "m", root / name, family, [0.5, 1.0], seed=10 + seed)
    tiny_model.write_tenant(d / "m", d / "b", family, [0.3, 0.8], adapter=False)
    port = free_port()
    small = tuple(a for a in servers.SMALL if a != "--skip-tokenizer-init")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(servers, "SMALL", small)
        process = start(
            *(str(d / "m"), "--family", str(d / "f"), "--base-profile", str(d / "b")),
            *("--adapter-root", str(d / "root"), "--slots", "3", "--served-model-name", "base"),
            *(x for name in NAMES[1:] for x in ("--tenant", f"{name}={d / 'root' / name}")),
            *("--enable-scale-out", "--port", str(port)),
            VLLM_SERVER_DEV_MODE="1",
        )
    lines, drain = until_serving(process)
    try:
        assert any(x.startswith("serving at") for x in lines), "\n".join(lines[-60:])
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as http:
            yield Server(d, http)
    finally:
        end(process, drain)


def test_every_route_that_takes_a_model_is_one_of_these() -> None:
    named = {route.partition(" ")[2] for route, rule in RULES.items() if rule.model}
    classes = [set(GENERATING), set(TOKENS_ONLY), set(RENDERING), ABSENT, NOT_IMPLEMENTED]
    assert set().union(*classes) == named | ADMINS
    assert sum(map(len, classes)) == len(set().union(*classes))
    assert {f"POST {path}" for path in ADMINS} <= set(RULES)


@pytest.mark.parametrize("path", GENERATING)
def test_the_named_model_serves_the_request(server: Server, path: str) -> None:
    responses = {name: server.response(path, name) for name in NAMES}
    assert {name: model for name, (model, _) in responses.items()} == {name: name for name in NAMES}
    assert len({str(completion) for _, completion in responses.values()}) == len(NAMES), responses
    case = GENERATING[path]
    for empty in (None, ""):
        if case.required:
            assert server.post(path, case.body, empty).status_code == 400
        else:
            assert server.response(path, empty) == responses["base"]


@pytest.mark.parametrize("path", [*GENERATING, *TOKENS_ONLY, *RENDERING])
def test_an_unknown_name_is_rejected(server: Server, path: str) -> None:
    generating = {path: case.body for path, case in GENERATING.items()}
    bodies: dict[str, Body] = {**generating, **TOKENS_ONLY, **RENDERING}
    for unknown in ("missing", "T0", " t0", "t0 ", "outside"):
        response = server.post(path, bodies[path], unknown)
        assert response.status_code == 404, response.text
        assert unknown in response.json()["error"]["message"]
    wrong: tuple[Any, ...] = (5, ["t0"], {})
    for name in wrong:
        assert server.post(path, {**bodies[path], "model": name}).status_code == 400


@pytest.mark.parametrize("path", RENDERING)
def test_a_prompt_rendered_for_a_tenant_is_served_by_it(server: Server, path: str) -> None:
    completions = set()
    for name in NAMES:
        response = server.post(path, RENDERING[path], name)
        assert response.status_code == 200, response.text
        rendered = response.json()
        rendered = rendered[0] if isinstance(rendered, list) else rendered
        assert rendered["model"] == name
        tokens = server.post(GENERATE_TOKENS, rendered).json()
        assert tokens["model"] == name
        completions.add(str(tokens["choices"][0]["token_ids"]))
    assert len(completions) == len(NAMES)


@pytest.mark.parametrize("path", sorted(ABSENT))
def test_missing_routes(server: Server, path: str) -> None:
    assert server.post(path, {"input": "x"}, "t0").json() == {"detail": "Not Found"}


def test_a_route_that_this_model_lacks(server: Server) -> None:
    body = {"state": "x", "questions": {"q": {"type": "choice", "criteria": {"a": 1, "b": 2}}}}
    assert server.post("/v1/systemone", body, "t0").status_code == 501


def test_completions_are_protected_as_the_files_say(server: Server) -> None:
    d = server.d
    places = {"base": d / "b", **{name: d / "root" / name for name in NAMES[1:]}}
    for name, place in places.items():
        (expected,) = reference(d / "m", d / "f", place, [TOKEN_IDS], tokens=6)
        for requested in (name, None) if name == "base" else (name,):
            assert server.response(GENERATE_TOKENS, requested) == (name, list(expected.tokens))


# -- SageMaker -------------------------------------------------------------------------------------


def test_invocations_is_the_plain_route_under_another_path(server: Server) -> None:
    for path in (CHAT, "/v1/completions"):
        body = GENERATING[path].body
        for name in (*NAMES, None):
            plain, invoked = (server.post(p, body, name).json() for p in (path, INVOCATIONS))
            assert (plain["model"], first(plain)) == (invoked["model"], first(invoked))


def test_invocations_takes_the_name_from_the_header_too(server: Server) -> None:
    body = GENERATING[INVOCATIONS].body
    for name in NAMES:
        for in_body in (None, "", name):
            response = server.post(INVOCATIONS, body, in_body, **{ADAPTER_HEADER: name})
            assert (response.json()["model"], first(response.json())) == server.response(CHAT, name)
    for in_body in (None, "missing"):
        response = server.post(INVOCATIONS, body, in_body, **{ADAPTER_HEADER: "missing"})
        assert response.status_code == 404
    for in_body, in_header in (("t0", "t1"), ("base", "t0"), ("t0", "base"), ("missing", "t0")):
        response = server.post(INVOCATIONS, body, in_body, **{ADAPTER_HEADER: in_header})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "model"


@pytest.mark.parametrize("path", ["/invocations%0A", "/invocations/"])
def test_other_spellings_of_the_path(server: Server, path: str) -> None:
    body = GENERATING[INVOCATIONS].body
    response = server.http.post(path, json={**body, "model": "t0"}, follow_redirects=True)
    assert response.json()["model"] == "t0"
    response = server.http.post(path, json={**body, "model": "missing"}, follow_redirects=True)
    assert response.status_code == 404


def test_a_stream_of_invocations_is_the_tenants(server: Server) -> None:
    body = {**GENERATING[INVOCATIONS].body, "model": "t0", "stream": True}
    lines = server.http.post(INVOCATIONS, json=body).text.split("\n\n")
    assert len(lines) > 3 and all('"model":"t0"' in line for line in lines[:-2])


def test_a_rejected_adapter_says_the_same_on_both_routes(server: Server) -> None:
    place = server.d / "root" / "late"
    for source, status in ((server.d / "outside", 400), (server.d / "root" / "none", 404)):
        load = server.post("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": str(source)})
        register = server.post("/adapters", {"name": "x", "src": str(source)})
        assert (load.status_code, register.status_code) == (status, status), register.text
        assert load.json()["error"]["message"] == register.json()["error"]["message"]
        assert server.post(CHAT, GENERATING[CHAT].body, "x").status_code == 404
    bodies: tuple[Any, ...] = ({"name": "x"}, {"src": "x"}, [], {"name": 1, "src": "x"})
    for body in bodies:
        assert server.post("/adapters", body).status_code == 400
    response = server.post("/adapters", {"name": "late", "src": str(place)})
    assert (response.status_code, response.text) == (200, "Adapter late registered")
    assert server.response(INVOCATIONS, "late")[0] == "late"
    again = server.post("/adapters", {"name": "late", "src": str(place)})
    assert again.status_code == 400
    assert server.http.delete("/adapters/missing").status_code == 404
    response = server.http.delete("/adapters/late", headers={ALIAS_HEADER: "shown"})
    assert (response.status_code, response.text) == (200, "Adapter shown unregistered")
    for path in (CHAT, INVOCATIONS):
        assert server.post(path, GENERATING[path].body, "late").status_code == 404
    assert server.http.get("/v1/safegene/ready").status_code == 200


# -- adapters that vLLM would pick by what a message holds -----------------------------------------


@pytest.mark.parametrize("path", [CHAT, INVOCATIONS, "/v1/messages"])
def test_the_type_of_a_content_part_names_no_adapter(server: Server, path: str) -> None:
    parts = messages([{"type": "text", "text": "hello"}])
    for name in NAMES:
        assert server.response(path, name, **parts) == server.response(path, name)


@pytest.mark.parametrize("path", [CHAT, INVOCATIONS])
def test_a_made_up_type_reaches_no_tenant(server: Server, path: str) -> None:
    plain = messages(["hello", {"type": "tool_reference", "name": "x"}])
    made_up = {"type": "t0_x", "uuid": "u", "tool_reference": 1, "name": "x"}
    for name in ("base", None):
        response = server.response(path, name, **messages(["hello", made_up]))
        assert response == server.response(path, name, **plain)
        assert response[0] == "base"
