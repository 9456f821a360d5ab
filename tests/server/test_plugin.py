"""The endpoint plugin against the smallest app: vLLM's model list and engine are faked at the edge.

`Engine` returns receipts as a worker would, right or wrong; `Models` publishes as vLLM's own class
does. What the real server does with all this is in test_server_engine.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient

from safegene_server import engine_client as engine_client_module
from safegene_server import error_responses, verifier
from safegene_server.plugin import endpoint_plugin
from safegene_vllm import tiny_model
from safegene_vllm.errors import (
    AdapterRejectedError,
    ConfigError,
    ConflictError,
    FrozenError,
    NotFoundError,
    ReceiptError,
    RegistryDownError,
    RegistryError,
    SafegeneError,
    SchemaError,
    SourceError,
    StoreError,
)
from safegene_vllm.formats.family import Family, read_family_header
from safegene_vllm.formats.profile import Profile, load_profile, make_profile, save_profile
from safegene_vllm.formats.receipt import AdapterReceipt, Receipt, gain_digest

LOAD = "/v1/load_lora_adapter"


@dataclass
class Request:
    """vLLM's LoRARequest, as far as we look at it."""

    lora_name: str
    lora_int_id: int
    lora_path: str
    load_inplace: bool = False


class Engine:
    """An engine client over workers that carry a vector; `twist` makes their receipts lie."""

    def __init__(
        self, additional_config: Any, *, model: str = "m", load_format: str = "auto"
    ) -> None:
        self.vllm_config = SimpleNamespace(
            additional_config=additional_config,
            load_config=SimpleNamespace(load_format=load_format),
            model_config=SimpleNamespace(model=model),
            parallel_config=SimpleNamespace(data_parallel_size=1),
            lora_config=SimpleNamespace(max_loras=4),
        )
        self.errored = False
        self.receipts: list[Receipt | None] = []
        self.twist: Callable[[Receipt], Receipt | None] = lambda receipt: receipt
        self.error: Exception | None = None
        self.admissions: list[str | None] = [None, None]
        self.removed: list[int] = []
        self.reading: list[list[bool]] = []
        self.called: list[str] = []

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        self.called.append(method)
        if method == "safegene_begin":
            assert [type(value) for value in args] == [str, int, str]
            return self.reading.pop(0) if self.reading else [True, True]
        if method == "safegene_add":
            assert [type(value) for value in args] == [str, int, str, bool]
            await self.add_lora(Request(*args))
            reports = self.reports()
            return [
                {"rejected": why, "receipt": None if why else receipt}
                for why, receipt in zip(self.admissions, reports, strict=True)
            ]
        assert method == "safegene_receipt"
        return self.reports()

    def reports(self) -> list[dict[str, Any] | None]:
        twisted = [None if r is None else self.twist(r) for r in self.receipts]
        return [None if r is None else r.to_dict() for r in twisted]

    async def add_lora(self, request: Request) -> bool:
        if self.error is not None:
            raise self.error
        self.receipts = [
            None if r is None else replace(r, adapters=(*r.adapters, held(r, request)))
            for r in self.receipts
        ]
        return True

    async def remove_lora(self, lora_int_id: int) -> bool:
        self.removed.append(lora_int_id)
        return True


def held(receipt: Receipt, request: Request) -> AdapterReceipt:
    """The receipt of a correct worker for an adapter it has just loaded."""
    try:
        profile: Profile | None = load_profile(Path(request.lora_path))
    except SafegeneError:
        profile = None
    row = gain_digest(profile.coefficients) if profile else None
    digest = profile.digest if profile else None
    return AdapterReceipt(request.lora_name, request.lora_int_id, 0, digest, row, 6, 14, 1.0)


class ErrorResponse:
    """vLLM's ErrorResponse."""

    def __init__(self, message: str, code: int) -> None:
        self.error = SimpleNamespace(code=code)
        self.body = {"error": {"message": message, "type": "XError", "param": None, "code": code}}

    def model_dump(self) -> dict[str, Any]:
        return self.body


class Models:
    """vLLM's OpenAIServingModels: publishes a name once `engine_client.add_lora` has not raised."""

    def __init__(self, engine: Engine) -> None:
        self.engine_client: Any = engine
        self.lora_requests: dict[str, Request] = {}
        self.base_model_paths = [SimpleNamespace(name="base")]
        self.model_config = SimpleNamespace(max_model_len=256)
        self.count = 0
        self.abridged = "an abridged message"

    async def load_lora_adapter(self, request: Any) -> str | ErrorResponse:
        name = request.lora_name
        if name in self.lora_requests and not request.load_inplace:
            return ErrorResponse("already loaded", 400)
        self.count += 1
        number = self.lora_requests[name].lora_int_id if name in self.lora_requests else self.count
        wanted = Request(name, number, request.lora_path, request.load_inplace)
        try:
            await self.engine_client.add_lora(wanted)
        except Exception:
            return ErrorResponse(self.abridged, 500)
        self.lora_requests[name] = wanted
        return f"Success: {name}"


@dataclass
class World:
    """Files, a fake engine that reports them correctly, and the app."""

    d: Path
    family: Family
    engine: Engine
    models: Models
    app: FastAPI

    def start(self, **state: Any) -> TestClient:
        """The app as vLLM has it after `init_app_state`; raises what `init_state` raises."""
        self.app.state.engine_client = state.get("engine", self.engine)
        self.app.state.openai_serving_models = self.models
        plugin = endpoint_plugin()
        plugin.attach_router(self.app)
        asyncio.run(plugin.init_state(state.get("engine", self.engine), self.app.state, None))
        return TestClient(self.app)

    def serve(self, name: str) -> None:
        """As if given by --lora-modules: loaded and published before the plugin is called."""
        done = asyncio.run(
            self.models.load_lora_adapter(
                SimpleNamespace(lora_name=name, lora_path=str(self.d / name), load_inplace=False)
            )
        )
        assert isinstance(done, str)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    d = tmp_path_factory.mktemp("server")
    tiny_model.make_model("llama", d / "m")
    family = tiny_model.write_family(d / "m", d / "f")
    for i in range(3):
        tiny_model.write_tenant(d / "m", d / f"t{i}", family, 0.5 + 0.1 * i, adapter=False)
    tiny_model.write_tenant(d / "m", d / "bare", None, None, suffixes=("q_proj",))
    return d


@pytest.fixture
def world(files: Path, tmp_path: Path) -> World:
    d = tmp_path / "w"
    shutil.copytree(files, d)
    return make_world(d, {"family": str(d / "f")})


def make_world(
    d: Path, settings: dict[str, Any] | None, *, load_format: str = "auto", runtime: bool = True
) -> World:
    header = read_family_header(d / "f")
    config = {} if settings is None else {"safegene": settings}
    engine = Engine(config, model=str(d / "m"), load_format=load_format)
    zeros = gain_digest([0.0] * header.num_layers)
    for rank in range(2):
        receipt = Receipt(rank, 2, "gain", header.digest, 14, 14, 1, None, zeros, False, "0.32.0")
        engine.receipts.append(receipt)
    app = FastAPI()

    if runtime:

        @app.post(LOAD)
        async def stock() -> str:
            return "stock"

        @app.get(LOAD)
        async def other_method() -> str:
            return "stock"

    return World(d, Family(header, {}), engine, Models(engine), app)


def shape_of_openai(body: Any, status: int) -> str:
    """The message, once the body has OpenAI's shape."""
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] == status
    assert body["error"]["type"].endswith("Error")
    return str(body["error"]["message"])


# -- start -----------------------------------------------------------------------------------------


def test_everything_served_at_start_is_verified(world: World) -> None:
    world.serve("t0")
    client = world.start()
    body = client.get("/v1/safegene/ready").json()
    profile = load_profile(world.d / "t0")
    assert body["ready"] is True
    assert body["family"] == {"name": "tiny", "digest": world.family.digest}
    assert body["tenants"] == [
        {
            "name": "t0",
            "apply": "gain",
            "profile": profile.digest,
            "slot": 0,
            "sites": 14,
            "layers": 2,
        }
    ]
    receipts = client.get("/v1/safegene/receipts").json()
    assert (receipts["ready"], receipts["faults"]) == (True, [])
    assert [r["rank"] for r in receipts["receipts"]] == [0, 1]


def other_profile(receipt: Receipt) -> Receipt:
    adapters = tuple(replace(a, profile="sha256:other") for a in receipt.adapters)
    return replace(receipt, adapters=adapters)


def second_rank_without(receipt: Receipt) -> Receipt:
    return replace(receipt, adapters=()) if receipt.rank == 1 else receipt


LIES: list[tuple[Callable[[Receipt], Receipt | None], str]] = [
    (lambda r: replace(r, family="sha256:other"), "rank 0 carries family sha256:other"),
    (lambda r: replace(r, sites_applied=3), "applied 3 of 14 sites"),
    (lambda r: replace(r, rank=0), "receipts from ranks [0, 0]"),
    (lambda r: None if r.rank == 1 else r, "ranks [1] carry no SafeGene"),
    (lambda r: replace(r, base_gain_digest="sha256:x"), "gain row sha256:x, the files say"),
    (other_profile, "rank 0 applied profile sha256:other"),
    (second_rank_without, "rank 1 has no adapter 't0'"),
]


@pytest.mark.parametrize(("twist", "words"), LIES)
def test_a_server_whose_receipts_disagree_does_not_start(
    world: World, twist: Callable[[Receipt], Receipt | None], words: str
) -> None:
    world.serve("t0")
    world.engine.twist = twist
    with pytest.raises(ReceiptError) as caught:
        world.start()
    assert words in str(caught.value)


@pytest.mark.parametrize(("twist", "words"), LIES)
def test_disagreement_later_is_503(
    world: World, twist: Callable[[Receipt], Receipt | None], words: str
) -> None:
    world.serve("t0")
    client = world.start()
    world.engine.twist = twist
    response = client.get("/v1/safegene/ready")
    assert response.status_code == 503
    assert words in shape_of_openai(response.json(), 503)
    receipts = client.get("/v1/safegene/receipts").json()
    assert receipts["ready"] is False
    assert words in receipts["faults"][0]


def test_without_the_general_plugin_the_server_does_not_start(world: World) -> None:
    async def none_of_that(method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        raise RuntimeError("Call to collective_rpc method failed: no safegene_receipt")

    world.engine.collective_rpc = none_of_that  # type: ignore[method-assign,assignment]
    with pytest.raises(ReceiptError, match="name `safegene` in VLLM_PLUGINS"):
        world.start()


def test_data_parallel_engines_are_rejected(world: World) -> None:
    world.engine.vllm_config.parallel_config.data_parallel_size = 2
    with pytest.raises(ConfigError, match="--data-parallel-size 2"):
        world.start()


def test_a_base_profile_must_be_in_the_receipts(world: World) -> None:
    base = make_profile(world.family.header, 0.3)
    save_profile(base, world.d / "base")
    settings = {"family": str(world.d / "f"), "base_profile": str(world.d / "base")}
    world = make_world(world.d, settings)
    with pytest.raises(ReceiptError, match="gives requests without an adapter profile None"):
        world.start()
    row = gain_digest(base.coefficients)
    world.engine.twist = lambda r: replace(r, base_profile=base.digest, base_gain_digest=row)
    body = world.start().get("/v1/safegene/ready").json()
    assert body["base"] == {"profile": base.digest, "layers": 2}


def test_weights_are_verified_against_the_checkpoints_profile(world: World) -> None:
    profile = load_profile(world.d / "t1")
    save_profile(profile, world.d / "m")
    world = make_world(world.d, {"family": str(world.d / "f")}, load_format="safegene")
    with pytest.raises(ReceiptError, match=profile.digest):
        world.start()
    row = gain_digest(profile.coefficients)
    world.engine.twist = lambda r: replace(r, base_profile=profile.digest, base_gain_digest=row)
    body = world.start().get("/v1/safegene/ready").json()
    assert (body["apply"], body["base"]["profile"]) == ("weights", profile.digest)


def test_without_a_family_the_server_is_not_ready(world: World) -> None:
    world = make_world(world.d, None)
    world.engine.receipts = [None]
    client = world.start()
    assert world.models.engine_client is world.engine
    response = client.get("/v1/safegene/ready")
    assert response.status_code == 503
    assert "no family loaded" in shape_of_openai(response.json(), 503)
    receipts = client.get("/v1/safegene/receipts").json()
    assert receipts["ready"] is False and "no family loaded" in receipts["faults"][0]
    body = {"lora_name": "x", "lora_path": "anywhere"}
    assert client.post(LOAD, json=body).text == "Success: x"
    world.engine.error = RuntimeError("no matter")
    wrapped = "Call to add_lora method failed: Worker failed with error 'a profile', please check "
    world.models.abridged = wrapped + "the stack trace above for the root cause"
    response = client.post(LOAD, json={**body, "lora_name": "y"})
    assert shape_of_openai(response.json(), 500) == "a profile"


def test_a_server_without_an_engine_says_so(world: World) -> None:
    client = world.start(engine=None)
    for path in ("/v1/safegene/ready", "/v1/safegene/receipts"):
        response = client.get(path)
        assert response.status_code == 503
        assert "no engine" in shape_of_openai(response.json(), 503)


def test_tenants_without_profile_in_the_open_mode(world: World) -> None:
    settings = {"family": str(world.d / "f"), "missing_profile": "serve_unprotected"}
    world = make_world(world.d, settings)
    world.serve("bare")
    body = world.start().get("/v1/safegene/ready").json()
    assert body["unprotected_mode"] is True
    assert body["tenants"][0] | {"slot": 0} == {
        "name": "bare",
        "apply": None,
        "profile": None,
        "slot": 0,
        "sites": 14,
        "layers": 0,
    }
    world.engine.twist = other_profile
    report = TestClient(world.app).get("/v1/safegene/receipts").json()
    assert "the files have none" in report["faults"][0]


def test_a_family_of_null_is_ready_and_says_unprotected(world: World) -> None:
    world = make_world(world.d, {"family": None, "missing_profile": "serve_unprotected"})
    world.engine.twist = lambda r: replace(r, family=None, base_gain_digest=None)
    body = world.start().get("/v1/safegene/ready").json()
    assert (body["family"], body["unprotected_mode"]) == (None, True)


# -- loading ---------------------------------------------------------------------------------------


def load(client: TestClient, name: str, path: Path | str, **more: Any) -> Any:
    return client.post(LOAD, json={"lora_name": name, "lora_path": str(path), **more})


def test_a_tenant_is_published_once_its_receipts_agree(world: World) -> None:
    client = world.start()
    response = load(client, "t1", world.d / "t1")
    assert (response.status_code, response.text) == (200, "Success: t1")
    tenants = client.get("/v1/safegene/ready").json()["tenants"]
    assert [t["name"] for t in tenants] == ["t1"]


def test_every_rank_has_read_an_adapter_before_it_is_added(world: World) -> None:
    client = world.start()
    (world.d / "t1" / "adapter_model.safetensors").write_bytes(b"read by the engine alone")
    world.engine.reading = [[False, False], [True, False], [True, True]]
    world.engine.called.clear()
    assert load(client, "t1", world.d / "t1").status_code == 200
    assert world.engine.called == [*["safegene_begin"] * 3, "safegene_add"]


def test_an_adapter_that_takes_too_long_to_read_is_rejected(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = world.start()
    monkeypatch.setattr(engine_client_module, "READ_S", -1.0)
    (world.d / "t1" / "adapter_model.safetensors").write_bytes(b"slow")
    world.engine.reading = [[False, False]] * 3
    world.engine.called.clear()
    response = load(client, "t1", world.d / "t1")
    assert "was not read within" in shape_of_openai(response.json(), 400)
    assert world.engine.called == ["safegene_begin"] and world.engine.removed == [1]
    assert world.models.lora_requests == {}


def test_a_revision_of_an_adapter_that_was_read_is_added_at_once(world: World) -> None:
    client = world.start()
    first, second = (world.d / t / "adapter_model.safetensors" for t in ("t1", "t2"))
    first.write_bytes(b"shared")
    first.chmod(0o444)
    second.hardlink_to(first)
    world.engine.called.clear()
    assert load(client, "t1", world.d / "t1").status_code == 200
    assert load(client, "t2", world.d / "t2").status_code == 200
    # A profile alone has nothing to be read.
    assert load(client, "t0", world.d / "t0").status_code == 200
    assert world.engine.called == ["safegene_begin", *["safegene_add"] * 3]


def test_a_tenant_whose_receipts_disagree_is_removed(world: World) -> None:
    client = world.start()
    world.engine.twist = second_rank_without
    response = load(client, "t1", world.d / "t1")
    assert response.status_code == 500
    assert "rank 1 has no adapter 't1'" in shape_of_openai(response.json(), 500)
    assert response.json()["error"]["param"] == "lora_path"
    assert (world.models.lora_requests, world.engine.removed) == ({}, [1])


def test_a_tenant_is_unreachable_before_it_is_verified(world: World) -> None:
    client = world.start()
    published: list[bool] = []
    call = world.engine.collective_rpc

    async def watched(method: str, args: tuple[Any, ...] = ()) -> Any:
        published.append("t1" in world.models.lora_requests)
        return await call(method, args)

    world.engine.collective_rpc = watched  # type: ignore[method-assign]
    assert load(client, "t1", world.d / "t1").status_code == 200
    assert published == [False]


@pytest.mark.parametrize(
    "wrapped",
    [
        "{}",
        "Call to add_lora method failed: {}",
        "Call to add_lora method failed: Worker failed with error '{}', please check the stack "
        "trace above for the root cause",
        "{}\nTraceback (most recent call last):\n  File x",
    ],
)
def test_the_engines_reason_is_in_the_response(world: World, wrapped: str) -> None:
    message = "tenant 't1': layer 0 has coefficient -1.0, expected 0.0 to 3.0\n- and more"
    client = world.start()
    world.engine.error = RuntimeError(wrapped.format(message))
    response = load(client, "t1", world.d / "t1")
    assert response.status_code == 400
    assert shape_of_openai(response.json(), 400) == message
    assert response.json()["error"]["param"] == "lora_path"
    assert world.engine.removed == [1]
    world.engine.error = None
    assert load(client, "t1", world.d / "t1").status_code == 200


@pytest.mark.parametrize(
    ("admissions", "message"),
    [
        (["no profile", "no profile"], "no profile"),
        ([None, "cannot be read"], "cannot be read"),
        (["one", "other"], "one\nother"),
    ],
)
def test_an_adapter_rejected_by_one_rank_is_removed_from_all(
    world: World, admissions: list[str | None], message: str
) -> None:
    client = world.start()
    world.engine.admissions = admissions
    response = load(client, "t1", world.d / "t1")
    assert shape_of_openai(response.json(), 400) == message
    assert (world.models.lora_requests, world.engine.removed) == ({}, [1])


def test_replies_out_of_step_are_reported(world: World) -> None:
    client = world.start()

    async def stale(method: str, args: tuple[Any, ...] = ()) -> Any:
        return [world.engine.receipts[0].to_dict(), True]  # type: ignore[union-attr]

    world.engine.collective_rpc = stale  # type: ignore[method-assign]
    response = client.get("/v1/safegene/ready")
    assert "out of step" in shape_of_openai(response.json(), 503)
    response = load(client, "t1", world.d / "t1")
    assert "out of step" in shape_of_openai(response.json(), response.status_code)
    assert world.models.lora_requests == {}


def test_a_rejected_reload_retains_the_served_adapter(world: World) -> None:
    client = world.start()
    load(client, "t1", world.d / "t1")
    world.engine.error = RuntimeError("load_inplace is rejected")
    response = load(client, "t1", world.d / "t1", load_inplace=True)
    assert response.status_code == 400
    assert world.engine.removed == []
    assert client.get("/v1/safegene/ready").status_code == 200


def test_a_dead_engine_is_503(world: World) -> None:
    client = world.start()
    world.engine.errored = True
    world.engine.error = RuntimeError("EngineCore died")
    response = load(client, "t1", world.d / "t1")
    assert "the engine is down" in shape_of_openai(response.json(), 503)


def test_a_given_profile_is_verified_in_place_of_the_file_s(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = world.start()
    request = Request("t1", 7, str(world.d / "t1"))
    own = load_profile(world.d / "t1")

    def read(path: Path) -> Profile:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr(verifier, "load_profile", read)
    other = replace(own, coefficients=tuple(0.0 for _ in own.coefficients))
    with pytest.raises(ReceiptError, match="t1"):
        asyncio.run(world.models.engine_client.add(request, other))
    assert world.engine.removed == [7]
    world.engine.receipts = [r and replace(r, adapters=()) for r in world.engine.receipts]
    assert asyncio.run(world.models.engine_client.add(request, own))
    client.close()


def test_errors_of_removal_are_translated(world: World) -> None:
    client = world.start()
    client_proxy = world.models.engine_client

    async def broken(lora_int_id: int) -> bool:
        raise RuntimeError("EngineCore died")

    assert asyncio.run(client_proxy.remove_lora(1)) is True
    world.engine.remove_lora = broken  # type: ignore[method-assign]
    with pytest.raises(AdapterRejectedError, match="EngineCore died"):
        asyncio.run(client_proxy.remove_lora(1))
    world.engine.errored = True
    with pytest.raises(error_responses.EngineDownError, match="the engine is down"):
        asyncio.run(client_proxy.remove_lora(1))
    client.close()


def test_a_silent_engine_is_503(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def asleep(method: str, args: tuple[Any, ...] = ()) -> Any:
        await asyncio.sleep(60)

    client = world.start()
    monkeypatch.setattr(verifier, "RECEIPT_TIMEOUT_S", 0.05)
    world.engine.collective_rpc = asleep  # type: ignore[method-assign]
    response = client.get("/v1/safegene/ready")
    assert "no receipts within" in shape_of_openai(response.json(), 503)


def test_readiness_without_a_key_queries_the_ranks_once_a_second(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(verifier, "time", SimpleNamespace(monotonic=lambda: now[0]))
    client = world.start()
    call, calls = world.engine.collective_rpc, []
    problems: list[str] = []

    async def counted(method: str, args: tuple[Any, ...] = ()) -> Any:
        calls.append(method)
        await asyncio.sleep(0.01)
        return await call(method, args)

    world.engine.collective_rpc = counted  # type: ignore[method-assign]
    for _ in range(2):
        assert client.get("/v1/safegene/ready").status_code == 200
    assert len(calls) == 2  # without a registry the launcher may query, and every client with a key
    replica = SimpleNamespace(problems=lambda: tuple(problems), version=3)
    world.app.state.safegene.replica = replica
    for second in (1, 2):
        for _ in range(3):
            body = client.get("/v1/safegene/ready").json()
            assert (body["ready"], body["tenants"], body["registry"]) == (True, [], 3)
        assert len(calls) == 2 + second
        now[0] += 1.0
    problems.append("acme@2 cannot be applied")
    response = client.get("/v1/safegene/ready")
    assert "not all that is published" in shape_of_openai(response.json(), 503)


def test_concurrent_requests_share_one_report(world: World) -> None:
    world.start()
    looking: verifier.Verifier = world.app.state.safegene.verifier
    calls, release = [], asyncio.Event()

    async def slow(method: str, args: tuple[Any, ...] = ()) -> Any:
        calls.append(method)
        await release.wait()
        return world.engine.reports()

    async def all_at_once() -> None:
        world.engine.collective_rpc = slow  # type: ignore[method-assign]
        waiting = [asyncio.create_task(looking.recent_report()) for _ in range(50)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.sleep(0)
        release.set()
        reports = await asyncio.gather(*waiting[1:])
        assert all(report is reports[0] and report.ready for report in reports)
        assert waiting[0].cancelled()

    asyncio.run(all_at_once())
    assert calls == ["safegene_receipt"]


def test_a_path_that_is_not_there_is_404(world: World) -> None:
    response = load(world.start(), "x", "/nowhere/at/all")
    assert response.status_code == 404
    assert "/nowhere/at/all" in shape_of_openai(response.json(), 404)
    assert world.models.lora_requests == {}


def test_paths_outside_the_roots_are_left_to_the_engine(world: World) -> None:
    """The response does not reveal whether they exist."""
    settings = {"family": str(world.d / "f"), "adapter_roots": [str(world.d)]}
    world = make_world(world.d, settings)
    client = world.start()
    world.engine.error = RuntimeError("outside safegene.adapter_roots")
    outside = world.d.parent / "outside"
    outside.mkdir()
    (outside / "adapter_model.safetensors").write_bytes(b"not to be looked at")
    world.engine.called.clear()
    around = str(world.d / "t1" / ".." / ".." / "outside")
    for path in ("/nowhere", "/usr", str(outside), around):
        assert load(client, "x", path).status_code == 400
    assert world.engine.called == ["safegene_add"] * 4
    assert load(client, "x", world.d / "none").status_code == 404


def test_below_a_root_written_with_dots_adapters_are_read_ahead(world: World) -> None:
    roots = [str(world.d / "t1" / "..")]
    world = make_world(world.d, {"family": str(world.d / "f"), "adapter_roots": roots})
    client = world.start()
    (world.d / "t1" / "adapter_model.safetensors").write_bytes(b"read by the engine alone")
    world.engine.called.clear()
    assert load(client, "t1", world.d / "t1").status_code == 200
    assert world.engine.called == ["safegene_begin", "safegene_add"]


def test_vllms_own_rejections_pass(world: World) -> None:
    client = world.start()
    load(client, "t1", world.d / "t1")
    response = load(client, "t1", world.d / "t1")
    assert (response.status_code, response.json()["error"]["message"]) == (400, "already loaded")


def test_changed_or_missing_files_do_not_unready_what_was_verified(world: World) -> None:
    client = world.start()
    load(client, "t1", world.d / "t1")
    save_profile(make_profile(world.family.header, 0.9), world.d / "t1")
    assert client.get("/v1/safegene/ready").status_code == 200
    shutil.rmtree(world.d / "t1")
    assert client.get("/v1/safegene/ready").status_code == 200


def test_an_unloaded_adapter_of_the_same_name_does_not_disturb(world: World) -> None:
    client = world.start()
    load(client, "t", world.d / "t1")
    del world.models.lora_requests["t"]
    assert load(client, "t", world.d / "t2").status_code == 200
    tenants = client.get("/v1/safegene/ready").json()["tenants"]
    assert [t["profile"] for t in tenants] == [load_profile(world.d / "t2").digest]


def test_adapters_published_past_the_engine_client_are_reported(world: World) -> None:
    client = world.start()
    world.models.lora_requests["x"] = Request("x", 9, str(world.d / "t1"))
    response = client.get("/v1/safegene/ready")
    assert "rank 0 has no adapter 'x'" in shape_of_openai(response.json(), 503)


def test_adapters_loaded_or_unloaded_during_a_report_are_no_error(world: World) -> None:
    world.serve("t1")
    client = world.start()
    call = world.engine.collective_rpc

    async def meanwhile(method: str, args: tuple[Any, ...] = ()) -> Any:
        results = await call(method, args)
        removed = world.models.lora_requests.pop("t1", None)
        fresh = Request("x", 9, str(world.d / "t1"))
        world.models.lora_requests["t1" if removed is None else "x"] = fresh
        return results

    world.engine.collective_rpc = meanwhile  # type: ignore[method-assign]
    response = client.get("/v1/safegene/ready")
    assert response.status_code == 200 and response.json()["tenants"] == []
    world.engine.collective_rpc = call  # type: ignore[method-assign]
    assert client.get("/v1/safegene/ready").status_code == 503


@pytest.mark.parametrize(
    ("content", "kind", "param"),
    [
        (json.dumps({"lora_name": "x"}), "application/json", "lora_path"),
        (json.dumps({"lora_name": 1, "lora_path": "x"}), "application/json", "lora_name"),
        ("{nope", "application/json", None),
        ("[]", "application/json", None),
        (json.dumps({"lora_name": "x", "lora_path": "x"}), "text/plain", None),
    ],
)
def test_bad_bodies(world: World, content: str, kind: str, param: str | None) -> None:
    response = world.start().post(LOAD, content=content, headers={"content-type": kind})
    shape_of_openai(response.json(), 400)
    assert response.json()["error"]["param"] == param


def test_an_unexpected_error_of_a_route_has_the_shape(world: World) -> None:
    client = world.start()
    world.models.lora_requests = None  # type: ignore[assignment]
    response = client.get("/v1/safegene/ready")
    assert "log" in shape_of_openai(response.json(), 500)


# -- wiring ----------------------------------------------------------------------------------------


def routes(app: FastAPI) -> set[tuple[str, str]]:
    found = [r for r in app.routes if isinstance(r, APIRoute)]
    return {(method, route.path) for route in found for method in route.methods}


def test_the_routes_are_these_and_all_below_v1(world: World) -> None:
    before = routes(FastAPI())
    plain = FastAPI()
    endpoint_plugin().attach_router(plain)
    assert routes(plain) - before == {
        ("GET", "/v1/safegene/receipts"),
        ("GET", "/v1/safegene/ready"),
    }
    assert all(path.startswith("/v1/") for _, path in routes(plain) - before)


def test_the_load_route_exists_only_where_it_replaces_vllms(world: World) -> None:
    client = world.start()
    assert sum(("POST", LOAD) in routes_of(r) for r in world.app.routes) == 1
    assert load(client, "t1", world.d / "t1").text == "Success: t1"
    assert client.get(LOAD).json() == "stock"
    without = make_world(world.d, {"family": str(world.d / "f")}, runtime=False)
    assert load(without.start(), "t1", world.d / "t1").status_code == 404


def routes_of(route: Any) -> set[tuple[str, str]]:
    methods = getattr(route, "methods", None) or ()
    return {(method, getattr(route, "path", "")) for method in methods}


@pytest.mark.parametrize("where", ["--api-key", "VLLM_API_KEY", None])
def test_sagemakers_routes_require_the_key(
    world: World, where: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    if where == "VLLM_API_KEY":
        monkeypatch.setenv("VLLM_API_KEY", "k1")
    keys = ["k0", "k1"] if where == "--api-key" else None
    world.app.state.args = SimpleNamespace(api_key=keys)
    client = world.start()

    @world.app.post("/adapters")
    async def register() -> str:
        return "registered"

    @world.app.delete("/adapters/{name}")
    async def remove(name: str) -> str:
        return name

    body = {"name": "t1", "src": str(world.d / "t1")}
    for call in (
        lambda h: client.post("/adapters", headers=h, json=body),
        lambda h: client.delete("/adapters/x", headers=h),
    ):
        if where is None:
            assert call({}).status_code == 200
            continue
        for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": "Basic k1"}):
            response = call(headers)
            shape_of_openai(response.json(), 401)
        assert call({"Authorization": "Bearer k1"}).status_code == 200
    assert client.get("/v1/safegene/ready").status_code == 200


def test_post_adapters_responds_as_the_load_route_does(world: World) -> None:
    client = world.start()

    def register(name: str, src: Any, **headers: str) -> Any:
        return client.post("/adapters", json={"name": name, "src": str(src)}, headers=headers)

    assert register("t1", world.d / "t1").text == "Adapter t1 registered"
    alias = {"X-Amzn-SageMaker-Adapter-Alias": "shown"}
    assert register("t2", world.d / "t2", **alias).text == "Adapter shown registered"
    tenants = client.get("/v1/safegene/ready").json()["tenants"]
    assert [t["profile"] for t in tenants] == [
        load_profile(world.d / name).digest for name in ("t1", "t2")
    ]
    world.engine.error = AdapterRejectedError("the profile was altered after calibration")
    for path, status in ((world.d / "t0", 400), ("/nowhere/at/all", 404)):
        loaded, registered = load(client, "x", path), register("x", path)
        message = shape_of_openai(loaded.json(), status)
        assert shape_of_openai(registered.json(), status) == message
        assert (loaded.status_code, registered.status_code) == (status, status)
        assert registered.json()["error"]["param"] == "src"
    again = register("t1", world.d / "t1")
    assert shape_of_openai(again.json(), 400) == "already loaded"


def test_bodies_of_adapters(world: World) -> None:
    client = world.start()
    for body, param in (
        ({"name": "x"}, "src"),
        ({"name": "", "src": "x"}, "name"),
        ({"name": "x", "src": 1}, "src"),
        ([], None),
        ("x", None),
    ):
        response = client.post("/adapters", json=body)
        shape_of_openai(response.json(), 400)
        assert response.json()["error"]["param"] == param
    params = {"name": "t1", "src": str(world.d / "t1")}
    assert client.post("/adapters", params=params).text == "Adapter t1 registered"
    assert client.post("/adapters", params={"name": "t1"}).status_code == 400


def test_no_serving_object_picks_an_adapter_itself(world: World) -> None:
    class Serving:
        def _get_active_default_mm_loras(self, request: Any) -> str:
            return "an adapter"

    serving = world.app.state.openai_serving_chat = Serving()
    other = world.app.state.another = SimpleNamespace()
    world.start()
    assert serving._get_active_default_mm_loras("a request") is None
    assert vars(other) == {}


def test_without_a_family_vllm_may_pick_as_it_does(files: Path) -> None:
    class Serving:
        def _get_active_default_mm_loras(self, request: Any) -> str:
            return "an adapter"

    world = make_world(files, None)
    serving = world.app.state.openai_serving_chat = Serving()
    world.start()
    assert serving._get_active_default_mm_loras("a request") == "an adapter"


def test_the_contract_of_vllm(world: World) -> None:
    plugin = endpoint_plugin()
    assert (plugin.name, plugin.required_tasks) == ("safegene_server", None)
    client = world.start()
    client_proxy = world.models.engine_client
    assert client_proxy is not world.engine and client_proxy.vllm_config is world.engine.vllm_config
    assert client.get("/v1/safegene/ready").status_code == 200


def test_status_codes_of_our_errors() -> None:
    assert error_responses.status_of(ReceiptError("x")) == 500
    assert error_responses.status_of(ConfigError("x")) == 400
    assert error_responses.status_of(SourceError("x")) == 400
    assert error_responses.status_of(StoreError("x")) == 507
    assert error_responses.status_of(RegistryError("x")) == 400
    assert error_responses.status_of(NotFoundError("x")) == 404
    assert (
        error_responses.status_of(ConflictError("x"))
        == error_responses.status_of(FrozenError("x"))
        == 409
    )
    assert (
        error_responses.status_of(SchemaError("x"))
        == error_responses.status_of(RegistryDownError("x"))
        == 503
    )
    assert error_responses.plain(RuntimeError("")) == "RuntimeError"
