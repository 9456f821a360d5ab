"""A whole server but for its engine: real registry, store, access and routes, and a fake replica.

The replica records its requests and can fail. Not a conftest: tests import what they use.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from artifact_files import FAMILY, a_tenant
from fastapi import FastAPI
from sqlalchemy import event

from safegene_server.access.catalog import Catalog, Limits, Principal, Tenant, View, make_view
from safegene_server.access.middleware import AccessMiddleware
from safegene_server.api import router
from safegene_server.artifacts import Store
from safegene_server.metrics.labels import TenantLabels
from safegene_server.metrics.settings import MetricsSettings
from safegene_server.monitoring.probes import PROBE, Prober, ProbeSettings, probe_handler
from safegene_server.monitoring.setup import Metrics
from safegene_server.registry import Job, Registry, Revision, Snapshot
from safegene_server.registry.validation import BASE
from safegene_server.server_state import ServerState
from safegene_server.tenants import (
    ONBOARD,
    GateSettings,
    Jobs,
    TenantContext,
    TenantSettings,
    onboard,
    read_prompts,
)

OURS = "/v1/safegene"
ACTOR = "admin"
KEYS = {
    "admin": (["admin", "serve"], ["*"]),
    "read": (["read"], ["*"]),
    "acme": (["admin", "serve"], ["acme", "acme/support"]),
    "serve": (["serve"], ["acme/support"]),
}
SECRETS = {name: f"sg-{name}-".ljust(40, "x") for name in KEYS}
REFUSAL = "I'm sorry, but I can't help with that."
HARMFUL = {prompt.prompt for prompt in read_prompts() if prompt.kind == "harmful"}
Complete = Callable[[str], str]


def good(prompt: str) -> str:
    """Completion of a tenant that passes."""
    return REFUSAL if prompt in HARMFUL else "Here is how that is usually done, step by step."


def view_of(snapshot: Snapshot) -> View:
    """Keys and published tenants of the registry."""
    keys = {}
    for key in snapshot.keys:
        keys[bytes.fromhex(key.hash)] = Principal(
            key.name,
            frozenset(key.scopes),
            frozenset(key.tenants) - {BASE},
            key.default_tenant,
            key.expires_at and key.expires_at.timestamp(),
            BASE in key.tenants,
        )
    tenants = [
        Tenant(t.name, t.published and f"{t.name}@{t.published}", limits=Limits(**t.limits))
        for t in snapshot.tenants
    ]
    return make_view(keys=keys, tenants=tenants)


class FakeReplica:
    """Holds what the registry publishes and what was loaded; `errors` by method name."""

    def __init__(self, registry: Registry, store: Store, catalog: Catalog) -> None:
        self.registry, self.store, self.catalog = registry, store, catalog
        self.header = FAMILY
        self.id = registry.replicas.join("host", 1, actor="replica").id
        self.held: set[str] = set()
        self.loads: list[str] = []
        self.requested: list[dict[str, Any]] = []
        self.errors: dict[str, Exception] = {}
        self.complete: Complete = good
        self.status = 200
        self.busiest = 0
        self._busy = 0
        self.used: list[str] = []
        self.by_priority = False
        self.others = 0
        self.applied_version = 0

    async def load(self, revision: Revision, path: Path | None = None) -> None:
        self._raise("load")
        found = path or self.store.revision(revision.adapter_digest, revision.profile)
        assert (found / "safegene.json").exists()
        self.held.add(revision.served_name)
        self.loads.append(revision.served_name)
        self.registry.replicas.heartbeat(
            self.id,
            applied_version=self.applied_version,
            receipts={revision.id: ({}, True)},
            actor="replica",
        )

    async def unload(self, revision: Revision) -> None:
        self._raise("unload")
        snapshot = self.registry.snapshot()
        spared = {r.served_name for r in (*snapshot.revisions, *snapshot.previous)}
        self.held -= {revision.served_name} - spared

    async def apply(self) -> None:
        self._raise("apply")
        snapshot = self.registry.snapshot()
        published = {revision.id: ({}, True) for revision in snapshot.revisions}
        self.held = {r.served_name for r in (*snapshot.revisions, *snapshot.previous)}
        self.applied_version = snapshot.version
        self.registry.replicas.heartbeat(
            self.id, applied_version=snapshot.version, receipts=published, actor="replica"
        )
        self.catalog.replace(view_of(snapshot))

    async def call(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> httpx.Response:
        self._raise("call")
        assert (method, path) == ("POST", "/v1/chat/completions") and body is not None
        assert body["model"] in self.held
        self.requested.append(body)
        self._busy += 1
        self.busiest = max(self.busiest, self._busy)
        await asyncio.sleep(0)
        self._busy -= 1
        if self.status != 200:
            return httpx.Response(self.status, json={"error": {"message": "no", "code": 0}})
        message = {"role": "assistant", "content": self.complete(body["messages"][0]["content"])}
        return httpx.Response(200, json={"model": body["model"], "choices": [{"message": message}]})

    def problems(self) -> tuple[str, ...]:
        return ()

    def served(self) -> list[tuple[str, Revision]]:
        served = {t.served for t in self.catalog.view.tenants.values()} & self.held
        snapshot = self.registry.snapshot()
        return [(r.tenant, r) for r in snapshot.revisions if r.served_name in served]

    @contextmanager
    def in_use(self, served: str) -> Iterator[None]:
        assert served in self.held
        self.used.append(served)
        yield

    def schedules_by_priority(self) -> bool:
        return self.by_priority

    def in_flight(self) -> int:
        return self.others

    def _raise(self, method: str) -> None:
        if method in self.errors:
            raise self.errors[method]


@functools.cache
def _furnished() -> Path:
    """A registry with the family and the four keys, to be copied."""
    folder = Path(tempfile.mkdtemp(prefix="sgtenancy"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    registry = Registry(folder / "registry.db")
    registry.families.add(FAMILY, None, actor="test")
    for name, (scopes, tenants) in KEYS.items():
        registry.keys.add(name, scopes=scopes, tenants=tenants, secret=SECRETS[name], actor="test")
    registry.close()
    return folder / "registry.db"


@functools.cache
def _app() -> FastAPI:
    """Building routes takes a while; only the state is a world's own."""
    app = FastAPI()
    app.include_router(router)
    return app


def _hurry(connection: Any, _record: Any) -> None:
    """Skip syncing to disk: data of these tests need not survive a crash."""
    connection.execute("PRAGMA synchronous = OFF")


class World:
    """`request` is a client with a key; `work` runs the oldest job that waits."""

    def __init__(self, root: Path, **settings: Any) -> None:
        shutil.copy(_furnished(), root / "registry.db")
        self.root = root
        self.registry = Registry(root / "registry.db", migrate=False)
        event.listen(self.registry.database.engine, "connect", _hurry)
        self.registry.database.engine.dispose()
        self.catalog = Catalog()
        self.store = Store(root / "store")
        self.replica = FakeReplica(self.registry, self.store, self.catalog)
        self.prober = Prober(self.replica, ProbeSettings(), read_prompts(), TenantLabels())
        self.tenancy = TenantContext(
            self.replica,
            self.registry,
            self.store,
            TenantSettings(**{"gate": GateSettings(enabled=False), **settings}),
        )
        self.jobs = Jobs(self.tenancy, {ONBOARD: onboard, PROBE: probe_handler(self.prober)})
        self.app = _app()
        self.app.state.safegene = ServerState(
            settings=None,
            metrics=Metrics(MetricsSettings(), None),
            tenants=self.tenancy,
            prober=self.prober,
        )
        self.access = AccessMiddleware(self.app, self.catalog)
        asyncio.run(self.replica.apply())

    def request(
        self, method: str, path: str, body: Any = None, *, key: str = "admin", **more: Any
    ) -> httpx.Response:
        if body is not None:
            more["json"] = body

        headers = {"Authorization": f"Bearer {SECRETS.get(key, key)}", **more.pop("headers", {})}

        async def once() -> httpx.Response:
            transport = httpx.ASGITransport(app=self.access, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://h") as client:
                return await client.request(method, OURS + path, headers=headers, **more)

        return asyncio.run(once())

    def json(self, method: str, path: str, body: Any = None, **more: Any) -> Any:
        """The JSON of a response that must be a success."""
        response = self.request(method, path, body, **more)
        assert response.is_success, response.text
        return response.json()

    def work(self) -> Job:
        """Run the oldest job that waits; it as it is then."""
        waiting = [j for j in self.registry.jobs.list() if j.state in ("queued", "running")]
        assert waiting, "no job waits"
        assert asyncio.run(self.jobs.run_one())
        return self.registry.jobs.get(waiting[-1].id)

    def adapter(self, name: str = "adapter", *, start: int = 1, profile: float | None = 1.0) -> str:
        """The directory of a fine-tune, as its owner gives it."""
        return str(a_tenant(self.root / name, start=start, profile=profile))

    def serve(self, name: str = "acme/support", **more: Any) -> None:
        """A tenant that is onboarded and published."""
        source = self.adapter(name.replace("/", "-"), **more)
        self.json("POST", "/tenants", {"name": name, "source": source})
        job = self.work()
        assert job.state == "done", job.message


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.registry.close()


def rejected(response: httpx.Response, status: int, words: str = "") -> str:
    """The message of a rejection, which must have OpenAI's shape."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert words in error["message"], error["message"]
    return str(error["message"])
