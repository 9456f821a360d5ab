"""A server whose registry is restored below it, as its clients see it: a real SQLite file, and real
access, routes, verifier and replica, over an engine that is as particular as vLLM's workers are.

The engine responds with the content that it really has, or had when it cached the prompt.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from registry_setup import copy_sqlite

from safegene_server import plugin
from safegene_server.registry import Registry, Revision
from safegene_vllm import tiny_model
from safegene_vllm.formats.family import FamilyHeader, read_family_header
from safegene_vllm.formats.profile import Profile, load_profile, make_profile
from safegene_vllm.formats.receipt import AdapterReceipt, Receipt, gain_digest

ADMIN, SERVE = (f"sg-{who}-".ljust(40, "x") for who in ("admin", "serve"))
PROMPT = "hello"


@dataclass
class LoRA:
    """vLLM's LoRARequest, as far as it is looked at."""

    lora_name: str
    lora_int_id: int
    lora_path: str
    load_inplace: bool = False


@dataclass
class Engine:
    """Workers that reject an id that changes its meaning, and a prefix cache keyed by name and
    path. `running` are requests in flight, by the adapter that each began with."""

    header: FamilyHeader
    family: Path
    adapters: dict[int, tuple[LoRA, Profile]] = field(default_factory=dict)
    cache: dict[tuple[str, str, str], str] = field(default_factory=dict)
    running: dict[int, LoRA] = field(default_factory=dict)
    errored: bool = False

    def __post_init__(self) -> None:
        self.vllm_config = SimpleNamespace(
            additional_config={"safegene": {"family": str(self.family)}},
            load_config=SimpleNamespace(load_format="auto"),
            model_config=SimpleNamespace(model="m"),
            parallel_config=SimpleNamespace(data_parallel_size=1),
            lora_config=SimpleNamespace(max_loras=4),
            scheduler_config=SimpleNamespace(policy="fcfs"),
        )

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        if method == "safegene_begin":
            return [True]
        if method == "safegene_add":
            rejected = self._add(LoRA(*args))
            receipt = None if rejected else self._receipt(only=args[1])
            return [{"rejected": rejected, "receipt": receipt}]
        return [self._receipt()]

    async def add_lora(self, lora: LoRA) -> bool:
        raise AssertionError("adapters are loaded through collective_rpc")

    async def remove_lora(self, number: int) -> bool:
        assert number not in {lora.lora_int_id for lora in self.running.values()}
        return self.adapters.pop(number, None) is not None

    def _add(self, lora: LoRA) -> str | None:
        known = self.adapters.get(lora.lora_int_id)
        if known is not None and known[0] != lora:
            return f"adapter id {lora.lora_int_id} is {known[0].lora_name!r}; use a new id."
        twins = {a.lora_int_id for a in self.running.values() if a.lora_name == lora.lora_name}
        assert twins <= {lora.lora_int_id}, "one name and two ids end the engine"
        self.adapters[lora.lora_int_id] = lora, load_profile(Path(lora.lora_path))
        return None

    def _receipt(self, only: int | None = None) -> dict[str, Any]:
        held = tuple(
            AdapterReceipt(lora.lora_name, n, 0, p.digest, gain_digest(p.coefficients), 14, 14, 1.0)
            for n, (lora, p) in self.adapters.items()
            if only in (None, n)
        )
        zeros = gain_digest([0.0] * self.header.num_layers)
        engine = (0, 1, "gain", self.header.digest, 14, 14, 1, None, zeros, False, "0.32.0")
        return Receipt(*engine, adapters=held).to_dict()

    async def generate(self, lora: LoRA, prompt: str, begun: Awaitable[Any] | None) -> str:
        """The digest of the profile that the completion is from."""
        number = len(self.running)
        self.running[number] = lora
        try:
            if begun is not None:
                await begun
            key = lora.lora_name, lora.lora_path, prompt
            own, profile = self.adapters[lora.lora_int_id]
            assert own == lora, "another adapter has the id of a request in flight"
            return self.cache.setdefault(key, profile.digest)
        finally:
            del self.running[number]


class World:
    """A server, its registry as an operator has it, and clients with keys."""

    def __init__(self, root: Path) -> None:
        self.root, self.file = root, root / "registry.db"
        tiny_model.make_model("llama", root / "m")
        family = tiny_model.write_family(root / "m", root / "f")
        tiny_model.write_tenant(root / "m", root / "adapters" / "acme", family, None, seed=1)
        self.header = read_family_header(root / "f")
        (root / "safegene.yaml").write_text(
            "registry: registry.db\nstore: store\ntenants: {gate: {enabled: false}}\n"
            "access: {response_model: revision}\n"
            f"sources: {{roots: [{root / 'adapters'}]}}\n"
            "keys:\n  - {name: admin, secret_env: ADMIN_KEY, scopes: [admin], tenants: ['*']}\n"
        )
        self.engine = Engine(self.header, root / "f")
        self.models = SimpleNamespace(
            lora_requests={},
            base_model_paths=[SimpleNamespace(name="base")],
            model_config=SimpleNamespace(max_model_len=256),
            engine_client=None,
            load_lora_adapter=None,
        )
        self.waiting: asyncio.Event | None = None
        self.begun = asyncio.Event()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        app = FastAPI()
        app.state.args = None

        @app.post("/v1/completions")
        async def completions(request: Request) -> dict[str, Any]:
            body = await request.json()
            lora, wait = self.models.lora_requests[body["model"]], self.waiting
            self.begun.set()
            text = await self.engine.generate(
                lora, body["prompt"], None if wait is None else wait.wait()
            )
            return {"model": lora.lora_name, "choices": [{"text": text}]}

        app.state.engine_client = self.engine
        app.state.openai_serving_models = self.models
        endpoints = plugin.endpoint_plugin()
        endpoints.attach_router(app)
        await endpoints.init_state(self.engine, app.state, None)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://h") as self.http:
            try:
                yield
            finally:
                await app.state.safegene.close()

    async def complete(self, key: str = SERVE, model: str = "acme") -> tuple[int, Any]:
        """The status, and (model, digest of the profile of the completion)."""
        response = await self.http.post(
            "/v1/completions",
            json={"model": model, "prompt": PROMPT},
            headers={"Authorization": f"Bearer {key}"},
        )
        body = response.json()
        if response.status_code != 200:
            return response.status_code, body["error"]["message"]
        return 200, (body["model"], body["choices"][0]["text"])

    async def admin(self, method: str, path: str, body: Any = None) -> Any:
        response = await self.http.request(
            method,
            f"/v1/safegene{path}",
            json=body,
            headers={"Authorization": f"Bearer {ADMIN}"},
            timeout=60,
        )
        assert response.is_success, response.text
        return response.json()

    async def ready(self) -> int:
        return (await self.http.get("/v1/safegene/ready")).status_code

    async def problems(self) -> str:
        return " ".join((await self.admin("GET", "/receipts"))["faults"])

    async def until_ready(self) -> list[int]:
        """Statuses until 200, which is looked at as often as can be."""
        found = []
        async with asyncio.timeout(300):
            while (status := await self.ready()) != 200:
                found.append(status)
                await asyncio.sleep(0.005)
        return found

    async def until_noticed(self) -> None:
        """503, and why."""
        async with asyncio.timeout(300):
            while (seen := await self.ready()) == 200:
                await asyncio.sleep(0.002)
        assert seen == 503
        assert "lost changes" in (problems := await self.problems()) or "acme@" in problems

    def other(self, first: float) -> Revision:
        """Another coefficient for what acme serves, by an operator who works on the registry."""
        registry = Registry(self.file)
        _, now = registry.revisions.published("acme")
        assert now is not None
        profile = make_profile(self.header, [first, 1.0], {"method": "test"})
        added = registry.revisions.add(
            "acme", profile, adapter_digest=now.adapter_digest, source=now.source, actor="op"
        )
        registry.revisions.set_state(added.id, "ready", actor="op")
        registry.rollouts.publish("acme", added.number, actor="op")
        registry.close()
        return added

    def call(self, step: Callable[[Registry], Any]) -> Any:
        registry = Registry(self.file)
        try:
            return step(registry)
        finally:
            registry.close()

    def back_up(self) -> None:
        copy_sqlite(self.file, self.root / "backup.db")

    def restore(self, *, replace: bool) -> None:
        """In place, as `sqlite3 registry.db ".restore backup.db"`; or another file by `mv`."""
        if not replace:
            copy_sqlite(self.root / "backup.db", self.file)
            return
        copy_sqlite(self.root / "backup.db", self.root / "new.db")
        for leftover in ("registry.db-wal", "registry.db-shm"):
            (self.root / leftover).unlink(missing_ok=True)
        os.replace(self.root / "new.db", self.file)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("SAFEGENE_SERVER_CONFIG", str(tmp_path / "safegene.yaml"))
    monkeypatch.setenv("ADMIN_KEY", ADMIN)
    monkeypatch.setattr(plugin, "lora_request", lambda n, i, path: LoRA(n, i, str(path)))
    monkeypatch.setattr(plugin, "check_vllm_args", lambda args: None)
    return World(tmp_path)


async def onboard(world: World) -> None:
    """acme@1, and a key for it."""
    await world.admin(
        "POST",
        "/tenants",
        {"name": "acme", "source": str(world.root / "adapters" / "acme"), "coefficients": 0.5},
    )
    world.call(
        lambda r: r.keys.add("k", scopes=["serve"], tenants=["acme"], secret=SERVE, actor="op")
    )
    async with asyncio.timeout(300):
        while (await world.complete())[0] != 200:
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("replace", [False, True], ids=["in place", "another file"])
@pytest.mark.parametrize("more", [0, 2, 5])
def test_nothing_of_a_lost_registry_is_served_or_admitted(
    world: World, replace: bool, more: int
) -> None:
    """A key that is revoked after the restore, and `acme@3` with other coefficients: before the
    version is as high as it was, when it is the same, and when it is higher."""

    async def scenario() -> None:
        async with world.serving():
            await onboard(world)
            first = await world.complete()
            world.back_up()
            for scale in (1.5, 2.0):
                await world.admin("PATCH", "/tenants/acme/profile", {"scale": scale})
            status, (model, before) = await world.complete()
            assert (status, model) == (200, "acme@3") and before != first[1][1]
            assert await world.ready() == 200
            lost = world.call(lambda r: r.revisions.get("acme", 3))
            assert lost.profile.digest == before

            world.restore(replace=replace)
            assert [world.other(value).number for value in (0.7, 0.9)] == [2, 3]
            for step in range(more):
                world.call(
                    lambda r, n=step + 1: r.tenants.set_limits("acme", {"concurrent": n}, actor="o")
                )
            now = world.call(lambda r: r.revisions.get("acme", 3))
            assert (now.id, now.served_name) == (lost.id, lost.served_name)
            await world.until_noticed()
            responses = [await world.complete()]
            while await world.ready() != 200:
                responses.append(await world.complete())
            # The old content until the registry has been read, then none, then the new.
            seen = [body[1] if status == 200 else str(status) for status, body in responses]
            assert [one for one, _ in groupby(seen)] in (
                [before, "404", now.profile.digest],
                [before, "404"],
                ["404", now.profile.digest],
                ["404"],
            )
            # The same name and the same prompt, and nothing from the cache of the old content.
            assert await world.complete() == (200, ("acme@3", now.profile.digest))
            assert await world.complete(model="acme@3") == (200, ("acme@3", now.profile.digest))
            held = {n: profile.digest for n, (_, profile) in world.engine.adapters.items()}
            assert held[now.id] == now.profile.digest and before not in held.values()
            body = (await world.http.get("/v1/safegene/ready")).json()
            assert body["registry"] == world.call(lambda r: r.version())

            world.call(lambda r: r.keys.revoke("k", actor="op"))
            async with asyncio.timeout(300):
                while (await world.complete())[0] != 401:
                    await asyncio.sleep(0.02)
            await world.until_ready()
            (shown,) = (await world.admin("GET", "/rollouts"))["data"][:1]
            async with asyncio.timeout(300):
                while not shown["done"]:
                    await asyncio.sleep(0.05)
                    shown = await world.admin("GET", f"/rollouts/{shown['id']}")
            assert (shown["applied"], shown["live"]) == (1, 1)

    asyncio.run(scenario())


def test_a_request_in_flight_ends_on_the_content_that_it_began_with(world: World) -> None:
    async def scenario() -> None:
        async with world.serving():
            await onboard(world)
            world.back_up()
            await world.admin("PATCH", "/tenants/acme/profile", {"scale": 1.5})
            lost = world.call(lambda r: r.revisions.get("acme", 2))
            world.waiting = asyncio.Event()
            world.begun.clear()
            running = asyncio.create_task(world.complete())
            await asyncio.wait_for(world.begun.wait(), 300)
            waiting, world.waiting = world.waiting, None
            world.restore(replace=False)
            now = world.other(0.9)
            assert (now.id, now.served_name) == (lost.id, lost.served_name)
            await world.until_noticed()
            async with asyncio.timeout(300):
                # The listener notices first; the reconciler withdraws the alias right after it.
                while (await world.complete())[0] != 404:
                    await asyncio.sleep(0.02)
                while "while the engine holds acme@2" not in await world.problems():
                    assert (await world.complete())[0] == 404
                    await asyncio.sleep(0.02)
            assert (await world.complete())[0] == 404 and not running.done()
            waiting.set()
            assert await running == (200, ("acme@2", lost.profile.digest))
            assert set(await world.until_ready()) <= {503}
            assert await world.complete() == (200, ("acme@2", now.profile.digest))

    asyncio.run(scenario())


def test_a_change_right_after_a_restore_is_of_the_registry_as_it_is(world: World) -> None:
    """Before the server has noticed anything: the change meets what was loaded under its number."""

    async def scenario() -> None:
        async with world.serving():
            await onboard(world)
            first = world.call(lambda r: r.revisions.get("acme", 1))
            world.back_up()
            for scale in (1.5, 2.0):
                await world.admin("PATCH", "/tenants/acme/profile", {"scale": scale})
            world.restore(replace=False)
            changed = await world.admin(
                "PATCH", "/tenants/acme/profile", {"scale": 0.5, "expected_revision": 1}
            )
            assert changed["revision"]["number"] == 2
            now = world.call(lambda r: r.revisions.get("acme", 2))
            assert now.profile.coefficients[0] == first.profile.coefficients[0] / 2
            assert await world.complete() == (200, ("acme@2", now.profile.digest))
            await world.until_ready()
            back = await world.admin("POST", "/tenants/acme/rollback", {})
            assert back["revision"]["number"] == 1
            assert await world.complete() == (200, ("acme@1", first.profile.digest))

    asyncio.run(scenario())


def test_a_missing_file_is_waited_for(world: World) -> None:
    """Serving continues; changes made meanwhile are rejected and not lost."""

    async def scenario() -> None:
        async with world.serving():
            await onboard(world)
            before = await world.complete()
            os.rename(world.file, world.root / "elsewhere.db")
            response = await world.http.request(
                "PATCH",
                "/v1/safegene/tenants/acme/profile",
                json={"scale": 2.0},
                headers={"Authorization": f"Bearer {ADMIN}"},
            )
            assert response.status_code == 503 and await world.complete() == before
            assert not world.file.exists()
            os.rename(world.root / "elsewhere.db", world.file)
            await world.admin("PATCH", "/tenants/acme/profile", {"scale": 2.0})
            status, (model, _) = await world.complete()
            assert (status, model) == (200, "acme@2")
            await world.until_ready()

    asyncio.run(scenario())
