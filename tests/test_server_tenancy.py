"""One real server on a registry: tenants come, change and go while it runs, as the openai client
sees it. Reference for every answer: another name for the same content that was never asked before.
"""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from servers import end, free_port, start, until_serving

from safegene_server.artifacts import Store
from safegene_server.registry import Registry, Replica, Revision
from safegene_vllm import pico
from safegene_vllm.family import FamilyHeader, load_family, read_family_header
from safegene_vllm.profile import make_profile

pytestmark = pytest.mark.engine

ADMIN, ACME, GLOBEX = (f"sg-{who}-{'0' * 40}" for who in ("admin", "acme", "globex"))
LONG = [3 + (7 * i) % 300 for i in range(120)]
CONFIG = """
registry: registry.sqlite
store: store
sources: {roots: [ROOT]}
tenants: {gate: {enabled: false}}
keys:
  - {name: admin, secret_env: ADMIN_KEY, scopes: [admin], tenants: ["*"]}
  - name: acme
    secret_env: ACME_KEY
    tenants: [acme/support, acme/cold, acme/cold2]
    default_tenant: acme/support
  - {name: globex, secret_env: GLOBEX_KEY, tenants: [globex]}
"""


@dataclass
class World:
    """What owners and operators have at hand: adapters on disk, the registry, the store."""

    d: Path
    header: FamilyHeader
    registry: Registry
    store: Store

    def add(self, tenant: str, source: str, coefficients: list[float]) -> Revision:
        """Register and publish; a tenant that is known gets another revision."""
        path = self.d / "root" / source
        if tenant not in {t.name for t in self.registry.tenants()}:
            self.registry.add_tenant(tenant, self.header.digest, source=str(path), actor="test")
        digest = self.store.stage(path, family=self.header).digest
        profile = make_profile(self.header, coefficients, {"method": "test"})
        added = self.registry.add_revision(tenant, profile, adapter_digest=digest, actor="test")
        self.registry.set_revision_state(added.id, "ready", actor="test")
        self.registry.publish(tenant, added.number, actor="test")
        return added


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    d = tmp_path_factory.mktemp("tenancy")
    pico.make_model("llama", d / "m")
    family = pico.write_family(d / "m", d / "f")
    for i, name in enumerate(("support", "globex")):
        pico.write_tenant(d / "m", d / "root" / name, family, None, seed=10 + i)
    (d / "safegene.yaml").write_text(CONFIG.replace("ROOT", str(d / "root")))
    registry = Registry(d / "registry.sqlite")
    header = read_family_header(d / "f")
    registry.add_family(header, str(d / "f"), actor="test")
    yield World(d, header, registry, Store(d / "store"))
    registry.close()


class Running:
    """A server process and clients for its keys."""

    def __init__(self, world: World) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.process: subprocess.Popen[str] = start(
            *(str(world.d / "m"), "--family", str(world.d / "f"), "--slots", "2"),
            *("--server-config", str(world.d / "safegene.yaml"), "--max-lora-rank", "8"),
            *("--served-model-name", "base", "--port", str(port), "--enable-prefix-caching"),
            ADMIN_KEY=ADMIN,
            ACME_KEY=ACME,
            GLOBEX_KEY=GLOBEX,
        )
        self.lines, self.drain = until_serving(self.process)
        assert self.lines[-1].startswith("serving at"), "\n".join(self.lines[-60:])
        self.pid = httpx.get(f"{self.url}/v1/safegene/ready", timeout=60).json()["pid"]
        self._clients: dict[str, openai.OpenAI] = {}
        self._https: dict[str, httpx.Client] = {}

    def http(self, key: str) -> httpx.Client:
        if key not in self._https:
            headers = {"Authorization": f"Bearer {key}"}
            self._https[key] = httpx.Client(base_url=self.url, headers=headers, timeout=60)
        return self._https[key]

    def client(self, key: str) -> openai.OpenAI:
        if key not in self._clients:
            url = f"{self.url}/v1"
            self._clients[key] = openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=60)
        return self._clients[key]

    def end(self) -> None:
        for client in (*self._clients.values(), *self._https.values()):
            client.close()
        end(self.process, self.drain)

    def ask(
        self, key: str, model: str, prompt: list[int] | None = None, **more: Any
    ) -> tuple[str, list[int]]:
        """(the answer's model, its tokens)."""
        answer = self.client(key).completions.create(
            model=model,
            prompt=prompt or LONG,
            max_tokens=8,
            temperature=0,
            extra_body={"return_token_ids": True, **more},
        )
        ids: list[int] = answer.choices[0].token_ids  # type: ignore[attr-defined]
        return answer.model, ids

    def replica(self, registry: Registry) -> Replica:
        return next(r for r in registry.replicas(alive_s=3600.0) if r.pid == self.pid)

    def follows(self, registry: Registry) -> float:
        """Wait until this replica has applied the registry's version; how long it took."""
        begun = time.monotonic()
        while self.replica(registry).applied_version < registry.version():
            assert time.monotonic() - begun < 20, registry.replicas()
            time.sleep(0.02)
        return time.monotonic() - begun


@pytest.fixture(scope="module")
def server(world: World) -> Iterator[Running]:
    world.add("acme/support", "support", [0.5, 1.0])
    running = Running(world)
    yield running
    running.end()


def refused(call: Callable[[], Any], status: int) -> str:
    with pytest.raises(openai.APIStatusError) as caught:
        call()
    assert caught.value.status_code == status, caught.value.response.text
    error = caught.value.response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return str(error["message"])


def test_a_tenant_sees_and_uses_its_own_and_nothing_else(server: Running) -> None:
    assert server.ask(ACME, "acme/support")[0] == "acme/support@1"
    assert server.ask(ACME, "acme/support@1")[0] == "acme/support@1"
    assert server.ask(ACME, "")[0] == "acme/support@1"
    foreign = refused(lambda: server.ask(GLOBEX, "acme/support"), 404)
    unknown = refused(lambda: server.ask(GLOBEX, "acme/nothing"), 404)
    assert foreign.replace("acme/support", "X") == unknown.replace("acme/nothing", "X")
    refused(lambda: server.ask(GLOBEX, "acme/support@1"), 404)
    for key in (ACME, GLOBEX):
        refused(lambda key=key: server.ask(key, "base"), 404)  # type: ignore[misc]
    refused(lambda: server.ask(GLOBEX, ""), 400)
    refused(lambda: server.ask("sg-nobody-" + "0" * 40, "acme/support"), 401)
    models = server.client(ACME).models.list().data
    assert [m.id for m in models] == ["acme/support"] and "/" not in str(models[0].root or "")[:1]
    assert server.client(GLOBEX).models.list().data == []


def test_every_route_needs_a_key_but_the_public_ones(server: Running) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as http:
        assert http.get("/health").status_code == 200
        ready = http.get("/v1/safegene/ready")
        assert ready.status_code == 200 and ready.json()["tenants"] == []
        routes = server.http(ADMIN).get("/openapi.json").json()["paths"]
        assert len(routes) > 20
        for path, methods in routes.items():
            for method in methods:
                if path in ("/health", "/ping", "/v1/safegene/ready") and method == "get":
                    continue
                answer = http.request(method, path.replace("{", "").replace("}", ""), json={})
                assert answer.status_code == 401, (method, path, answer.status_code)
    assert server.http(ADMIN).post("/v1/load_lora_adapter", json={}).status_code == 404


def test_a_change_is_live_at_once_and_never_answered_from_stale_blocks(
    server: Running, world: World
) -> None:
    first = server.ask(ACME, "acme/support")[1]
    assert server.ask(ACME, "acme/support")[1] == first
    added = world.add("acme/support", "support", [2.0, 0.3])
    assert server.follows(world.registry) < 2.0
    model, changed = server.ask(ACME, "acme/support")
    assert model == f"acme/support@{added.number}"
    assert server.ask(ACME, "acme/support")[1] == changed
    world.add("acme/cold", "support", [2.0, 0.3])
    server.follows(world.registry)
    assert server.ask(ACME, "acme/cold")[1] == changed != first
    world.registry.rollback("acme/support", actor="test")
    server.follows(world.registry)
    assert server.ask(ACME, "acme/support") == ("acme/support@1", first)
    world.add("acme/cold2", "support", [0.5, 1.0])
    server.follows(world.registry)
    assert server.ask(ACME, "acme/cold2")[1] == first


def test_a_request_in_flight_ends_on_the_revision_it_began_with(
    server: Running, world: World
) -> None:
    began, done = threading.Event(), []

    def long_request() -> None:
        stream = server.client(ACME).completions.create(
            model="acme/support", prompt=LONG, max_tokens=120, temperature=0, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        for chunk in stream:
            began.set()
            done.append(chunk.model)

    before = server.ask(ACME, "acme/support")[0]
    thread = threading.Thread(target=long_request)
    thread.start()
    assert began.wait(30)
    added = world.add("acme/support", "support", [1.0, 1.5])
    server.follows(world.registry)
    assert server.ask(ACME, "acme/support")[0] == f"acme/support@{added.number}" != before
    thread.join(60)
    assert set(done) == {before} and len(done) > 60


def test_a_retired_tenant_and_a_revoked_key_end_at_once(server: Running, world: World) -> None:
    world.add("globex", "globex", [0.7, 0.7])
    server.follows(world.registry)
    assert server.ask(GLOBEX, "globex")[0] == "globex@1"
    world.registry.retire("globex", actor="test")
    server.follows(world.registry)
    refused(lambda: server.ask(GLOBEX, "globex"), 404)
    told = world.registry.add_key("x", scopes=["serve"], tenants=["acme/support"], actor="test")
    server.follows(world.registry)
    server.ask(told.secret, "acme/support")
    world.registry.revoke_key("x", actor="test")
    server.follows(world.registry)
    refused(lambda: server.ask(told.secret, "acme/support"), 401)


def test_what_cannot_be_applied_is_not_served_and_hurts_nobody(
    server: Running, world: World
) -> None:
    before = server.ask(ACME, "acme/support")
    world.registry.add_tenant("broken", world.header.digest, source="/nowhere", actor="test")
    profile = make_profile(world.header, [1.0, 1.0], {"method": "test"})
    added = world.registry.add_revision(
        "broken", profile, adapter_digest="sha256:" + "ab" * 32, actor="test"
    )
    world.registry.set_revision_state(added.id, "ready", actor="test")
    rollout = world.registry.publish("broken", added.number, actor="test")
    deadline = time.monotonic() + 10
    while not server.replica(world.registry).faults:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert server.ask(ACME, "acme/support") == before
    assert any(
        "broken@1" in f for f in server.http(ADMIN).get("/v1/safegene/receipts").json()["faults"]
    )
    with httpx.Client(base_url=server.url) as http:
        ready = http.get("/v1/safegene/ready")
        assert ready.status_code == 503 and "broken" not in ready.text
    status = world.registry.rollout_status(rollout.id)
    assert (status.applied, status.live) == (0, 1) and "broken@1" in status.lagging[0].reason
    world.registry.retire("broken", actor="test")
    server.follows(world.registry)
    assert server.http(ADMIN).get("/v1/safegene/ready").status_code == 200


def test_a_tenants_life_over_http(server: Running, world: World) -> None:
    family = load_family(world.d / "f")
    pico.write_tenant(world.d / "m", world.d / "root" / "live", family, [0.4, 0.8], seed=20)
    admin = server.http(ADMIN)
    begun = time.monotonic()
    body = {"name": "live", "source": str(world.d / "root" / "live")}
    told = admin.post("/v1/safegene/tenants", json=body)
    assert told.status_code in (200, 201, 202), told.text
    job = told.json()["job"]
    while job["state"] in ("queued", "running"):
        assert time.monotonic() - begun < 30
        time.sleep(0.02)
        job = admin.get(f"/v1/safegene/jobs/{job['id']}").json()
    assert (job["state"], job["revision"]) == ("done", "live@1"), job
    key = {"name": "live", "scopes": ["serve"], "tenants": ["live"]}
    secret = admin.post("/v1/safegene/keys", json=key).json()
    first = server.ask(secret["secret"], "live")
    assert first[0] == "live@1"
    stale = admin.patch(
        "/v1/safegene/tenants/live/profile", json={"scale": 2.0, "expected_revision": 7}
    )
    assert stale.status_code == 409
    changed = admin.patch(
        "/v1/safegene/tenants/live/profile", json={"scale": 2.0, "expected_revision": 1}
    )
    assert changed.status_code == 200, changed.text
    second = server.ask(secret["secret"], "live")
    assert second[0] == "live@2" and second[1] != first[1]
    rollout = changed.json()["rollout"]["id"]
    shown = admin.get(f"/v1/safegene/rollouts/{rollout}").json()
    assert (shown["applied"], shown["live"], shown["done"]) == (1, 1, True)
    assert admin.post("/v1/safegene/tenants/live/rollback", json={}).status_code == 200
    assert server.ask(secret["secret"], "live") == first
    admin.post("/v1/safegene/tenants/live/freeze").raise_for_status()
    frozen = admin.patch("/v1/safegene/tenants/live/profile", json={"scale": 2.0})
    assert frozen.status_code == 409 and server.ask(secret["secret"], "live") == first
    admin.post("/v1/safegene/tenants/live/unfreeze").raise_for_status()
    floor = {"floor": {"0": 1.0, "1": 1.0}}
    raised = admin.put(f"/v1/safegene/families/{world.header.digest}/floor", json=floor)
    assert raised.status_code == 200, raised.text
    assert server.ask(secret["secret"], "live")[0] == "live@3"
    coefficients = admin.get("/v1/safegene/tenants/live/revisions").json()["data"]
    assert [1.0, 1.0] in [revision["coefficients"] for revision in coefficients]
    lifted = admin.put(f"/v1/safegene/families/{world.header.digest}/floor", json={"floor": {}})
    assert lifted.status_code == 200
    assert admin.delete("/v1/safegene/tenants/live").status_code == 200
    refused(lambda: server.ask(secret["secret"], "live"), 404)
    assert server.http(ACME).get("/v1/safegene/tenants").status_code == 403


def test_a_second_replica_follows_the_same_registry(server: Running, world: World) -> None:
    other = Running(world)
    try:
        assert other.ask(ACME, "acme/support") == server.ask(ACME, "acme/support")
        added = world.add("acme/support", "support", [0.9, 0.9])
        for running in (server, other):
            deadline = time.monotonic() + 2.0
            while running.ask(ACME, "acme/support")[0] != f"acme/support@{added.number}":
                assert time.monotonic() < deadline
        last = world.registry.rollouts(limit=1)[0]
        status = world.registry.rollout_status(last.id)
        assert (status.applied, status.live) == (2, 2)
        other.process.send_signal(signal.SIGKILL)
        again = world.add("acme/support", "support", [0.8, 0.8])
        server.follows(world.registry)
        assert server.ask(ACME, "acme/support")[0] == f"acme/support@{again.number}"
    finally:
        other.end()


def test_killed_and_started_again_it_serves_what_is_published(
    server: Running, world: World
) -> None:
    expected = {m.id: server.ask(ACME, m.id) for m in server.client(ACME).models.list().data}
    world.add("acme/support", "support", [0.2, 0.1])
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    again = Running(world)
    try:
        before = expected.pop("acme/support")
        assert again.ask(ACME, "acme/support")[0] != before[0]
        assert {name: again.ask(ACME, name) for name in expected} == expected
        applied = again.replica(world.registry).applied_version
        assert applied == world.registry.version()
    finally:
        again.end()
