"""Two real servers on one registry: tenants are added, changed and removed while they run, as
the openai client sees it. Reference for every completion: another name of the same content, never
requested before.
The registry is on a real PostgreSQL where the machine has one, else in a SQLite file.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from registry_server import ADMIN, Running, World, make_world
from registry_setup import back_up, has_postgres, postgres

from safegene_server.registry import Registry
from safegene_vllm import tiny_model
from safegene_vllm.formats.family import load_family
from safegene_vllm.formats.profile import make_profile

pytestmark = pytest.mark.engine

ACME, GLOBEX = (f"sg-{who}-{'0' * 40}" for who in ("acme", "globex"))
KEYS = """
  - name: acme
    secret_env: ACME_KEY
    tenants: [acme/support, acme/cold, acme/cold2]
    default_tenant: acme/support
  - {name: globex, secret_env: GLOBEX_KEY, tenants: [globex]}
"""
LONG = [3 + (7 * i) % 300 for i in range(200)]
"""More than one block of the prefix cache, which holds 128 tokens on a CPU."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("tenancy")
    url = f"sqlite:///{folder / 'registry.sqlite'}"
    if has_postgres():
        url = postgres().url(postgres().create("migrated"))
    made = make_world(folder, {"support": 10, "globex": 11}, url=url, more=KEYS)
    yield made
    made.registry.close()


class Server(Running):
    """With the two tenants' keys, and the long prompt unless another is given."""

    def __init__(self, world: World) -> None:
        super().__init__(world, ACME_KEY=ACME, GLOBEX_KEY=GLOBEX)

    def complete(
        self, key: str, model: str, prompt: list[int] | None = None, **more: Any
    ) -> tuple[str, list[int]]:
        return super().complete(key, model, prompt or LONG, **more)

    def cached(self) -> int:
        """Number of prompt tokens taken from the prefix cache so far."""
        lines = self.http(ADMIN).get("/metrics").text.splitlines()
        found = [line for line in lines if line.startswith("vllm:prefix_cache_hits_total{")]
        assert len(found) == 1, found
        return int(float(found[0].split()[-1]))


@pytest.fixture(scope="module")
def server(world: World) -> Iterator[Server]:
    world.add("acme/support", "support", [0.5, 1.0])
    running = Server(world)
    yield running
    running.end()


def rejected(call: Callable[[], Any], status: int) -> str:
    with pytest.raises(openai.APIStatusError) as caught:
        call()
    assert caught.value.status_code == status, caught.value.response.text
    error = caught.value.response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return str(error["message"])


def test_a_tenant_sees_and_uses_its_own_and_nothing_else(server: Server) -> None:
    assert server.complete(ACME, "acme/support")[0] == "acme/support@1"
    assert server.complete(ACME, "acme/support@1")[0] == "acme/support@1"
    assert server.complete(ACME, "")[0] == "acme/support@1"
    foreign = rejected(lambda: server.complete(GLOBEX, "acme/support"), 404)
    unknown = rejected(lambda: server.complete(GLOBEX, "acme/nothing"), 404)
    assert foreign.replace("acme/support", "X") == unknown.replace("acme/nothing", "X")
    rejected(lambda: server.complete(GLOBEX, "acme/support@1"), 404)
    for key in (ACME, GLOBEX):
        rejected(lambda key=key: server.complete(key, "base"), 404)  # type: ignore[misc]
    rejected(lambda: server.complete(GLOBEX, ""), 400)
    rejected(lambda: server.complete("sg-absent-" + "0" * 40, "acme/support"), 401)
    models = server.client(ACME).models.list().data
    assert [m.id for m in models] == ["acme/support"] and "/" not in str(models[0].root or "")[:1]
    assert server.client(GLOBEX).models.list().data == []


def test_every_route_needs_a_key_but_the_public_ones(server: Server) -> None:
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
                response = http.request(method, path.replace("{", "").replace("}", ""), json={})
                assert response.status_code == 401, (method, path, response.status_code)
    assert server.http(ADMIN).post("/v1/load_lora_adapter", json={}).status_code == 404


def test_a_change_is_live_at_once_and_never_served_from_stale_blocks(
    server: Server, world: World
) -> None:
    def hits(tenant: str) -> tuple[list[int], int]:
        """The completion's tokens, and how many of the prompt's were cached."""
        before = server.cached()
        tokens = server.complete(ACME, tenant)[1]
        return tokens, server.cached() - before

    first = server.complete(ACME, "acme/support")[1]
    assert hits("acme/support") == (first, 128)
    added = world.add("acme/support", "support", [2.0, 0.3])
    took_s = [server.follows(world.registry)]
    changed, cached = hits("acme/support")
    assert (
        cached == 0 and server.complete(ACME, "acme/support")[0] == f"acme/support@{added.number}"
    )
    assert hits("acme/support") == (changed, 128)
    world.add("acme/cold", "support", [2.0, 0.3])
    took_s.append(server.follows(world.registry))
    assert hits("acme/cold") == (changed, 0) and changed != first
    world.registry.rollouts.rollback("acme/support", actor="test")
    took_s.append(server.follows(world.registry))
    assert hits("acme/support") == (first, 128)
    world.add("acme/cold2", "support", [0.5, 1.0])
    took_s.append(server.follows(world.registry))
    assert hits("acme/cold2") == (first, 0)
    # Polls are 0.5 s apart; a busy machine may take long for one.
    assert min(took_s) < 60.0


def test_a_request_in_flight_ends_on_the_revision_it_began_with(
    server: Server, world: World
) -> None:
    began, done, tokens = threading.Event(), [], []

    def long_request() -> None:
        stream = server.client(ACME).completions.create(
            model="acme/support", prompt=LONG[:120], max_tokens=120, temperature=0, stream=True,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )  # fmt: skip
        for chunk in stream:
            began.set()
            done.append(chunk.model)
            tokens.extend(chunk.choices[0].token_ids)  # type: ignore[attr-defined]

    before = server.complete(ACME, "acme/support")[0]
    thread = threading.Thread(target=long_request)
    thread.start()
    assert began.wait(60)
    added = world.add("acme/support", "support", [1.0, 1.5])
    server.follows(world.registry)
    assert server.complete(ACME, "acme/support")[0] == f"acme/support@{added.number}" != before
    thread.join(60)
    assert set(done) == {before} and len(tokens) == 120


def test_a_retired_tenant_and_a_revoked_key_end_at_once(server: Server, world: World) -> None:
    world.add("globex", "globex", [0.7, 0.7])
    server.follows(world.registry)
    assert server.complete(GLOBEX, "globex")[0] == "globex@1"
    world.registry.rollouts.retire("globex", actor="test")
    server.follows(world.registry)
    rejected(lambda: server.complete(GLOBEX, "globex"), 404)
    added = world.registry.keys.add("x", scopes=["serve"], tenants=["acme/support"], actor="test")
    server.follows(world.registry)
    server.complete(added.secret, "acme/support")
    world.registry.keys.revoke("x", actor="test")
    server.follows(world.registry)
    rejected(lambda: server.complete(added.secret, "acme/support"), 401)


def test_what_cannot_be_applied_is_not_served_and_affects_no_other_tenant(
    server: Server, world: World
) -> None:
    before = server.complete(ACME, "acme/support")
    world.registry.tenants.add("broken", world.header.digest, source="/nowhere", actor="test")
    profile = make_profile(world.header, [1.0, 1.0], {"method": "test"})
    added = world.registry.revisions.add(
        "broken", profile, adapter_digest="sha256:" + "ab" * 32, actor="test"
    )
    world.registry.revisions.set_state(added.id, "ready", actor="test")
    rollout = world.registry.rollouts.publish("broken", added.number, actor="test")
    deadline = time.monotonic() + 300
    while not server.replica(world.registry).faults:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert server.complete(ACME, "acme/support") == before
    assert any(
        "broken@1" in f for f in server.http(ADMIN).get("/v1/safegene/receipts").json()["faults"]
    )
    with httpx.Client(base_url=server.url, timeout=60) as http:
        ready = http.get("/v1/safegene/ready")
        assert ready.status_code == 503 and "broken" not in ready.text
    status = world.registry.rollouts.status(rollout.id)
    assert (status.applied, status.live) == (0, 1) and "broken@1" in status.lagging[0].reason
    world.registry.rollouts.retire("broken", actor="test")
    server.follows(world.registry)
    assert server.http(ADMIN).get("/v1/safegene/ready").status_code == 200


def reported(done: Callable[[], bool]) -> None:
    """Wait for the reports of servers, which follow shortly after their responses."""
    deadline = time.monotonic() + 300
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_registry_that_was_restored_is_followed_as_it_is(server: Server, world: World) -> None:
    """A revision and a key of the transactions that were lost, and other content under the id and
    the name of the one: not what the engine has, nor what it has cached."""
    restore = back_up(world.registry)
    lost = world.add("acme/support", "support", [1.7, 0.2])
    lost_key = world.registry.keys.add(
        "y", scopes=["serve"], tenants=["acme/support"], actor="test"
    )
    server.follows(world.registry)
    before = server.complete(lost_key.secret, "acme/support")
    assert before[0] == lost.served_name and server.complete(ACME, "acme/support") == before
    restore()
    now = world.add("acme/support", "support", [0.3, 1.9])
    assert (now.id, now.served_name) == (lost.id, lost.served_name)
    deadline, hits, completions = time.monotonic() + 300, 0, []
    # It may be seen restored, and serve what was published before, until there is the new one.
    while not completions or completions[-1] == before or completions[-1][0] != now.served_name:
        assert time.monotonic() < deadline
        hits = server.cached()
        try:
            completions.append(server.complete(ACME, "acme/support"))
        except openai.NotFoundError:
            time.sleep(0.01)
    assert server.cached() == hits, "blocks of the former content under the same name"
    server.follows(world.registry)
    rejected(lambda: server.complete(lost_key.secret, "acme/support"), 401)
    world.add("acme/cold", "support", [0.3, 1.9])
    server.follows(world.registry)
    assert completions[-1] == (now.served_name, server.complete(ACME, "acme/cold")[1])
    assert server.complete(ACME, "acme/support") == completions[-1] != before
    assert server.http(ADMIN).get("/v1/safegene/ready").status_code == 200
    assert server.http(ADMIN).get("/v1/safegene/receipts").json()["faults"] == []
    losses = "safegene_registry_losses_total 1.0"
    assert losses in server.http(ADMIN).get("/metrics").text.splitlines()


def test_a_tenants_life_over_http(server: Server, world: World) -> None:
    family = load_family(world.d / "f")
    tiny_model.write_tenant(world.d / "m", world.d / "root" / "live", family, [0.4, 0.8], seed=20)
    admin = server.http(ADMIN)
    begun = time.monotonic()
    body = {"name": "live", "source": str(world.d / "root" / "live")}
    response = admin.post("/v1/safegene/tenants", json=body)
    assert response.status_code in (200, 201, 202), response.text
    job = response.json()["job"]
    while job["state"] in ("queued", "running"):
        assert time.monotonic() - begun < 300
        time.sleep(0.02)
        job = admin.get(f"/v1/safegene/jobs/{job['id']}").json()
    assert (job["state"], job["revision"]) == ("done", "live@1"), job
    key = {"name": "live", "scopes": ["serve"], "tenants": ["live"]}
    secret = admin.post("/v1/safegene/keys", json=key).json()
    first = server.complete(secret["secret"], "live")
    assert first[0] == "live@1"
    stale = admin.patch(
        "/v1/safegene/tenants/live/profile", json={"scale": 2.0, "expected_revision": 7}
    )
    assert stale.status_code == 409
    changed = admin.patch(
        "/v1/safegene/tenants/live/profile", json={"scale": 2.0, "expected_revision": 1}
    )
    assert changed.status_code == 200, changed.text
    second = server.complete(secret["secret"], "live")
    assert second[0] == "live@2" and second[1] != first[1]
    rollout = changed.json()["rollout"]["id"]
    reported(lambda: bool(admin.get(f"/v1/safegene/rollouts/{rollout}").json()["done"]))
    shown = admin.get(f"/v1/safegene/rollouts/{rollout}").json()
    assert (shown["applied"], shown["live"], shown["done"]) == (1, 1, True)
    assert admin.post("/v1/safegene/tenants/live/rollback", json={}).status_code == 200
    assert server.complete(secret["secret"], "live") == first
    admin.post("/v1/safegene/tenants/live/freeze").raise_for_status()
    frozen = admin.patch("/v1/safegene/tenants/live/profile", json={"scale": 2.0})
    assert frozen.status_code == 409 and server.complete(secret["secret"], "live") == first
    admin.post("/v1/safegene/tenants/live/unfreeze").raise_for_status()
    floor = {"floor": {"0": 1.0, "1": 1.0}}
    raised = admin.put(f"/v1/safegene/families/{world.header.digest}/floor", json=floor)
    assert raised.status_code == 200, raised.text
    assert server.complete(secret["secret"], "live")[0] == "live@3"
    coefficients = admin.get("/v1/safegene/tenants/live/revisions").json()["data"]
    assert [1.0, 1.0] in [revision["coefficients"] for revision in coefficients]
    lifted = admin.put(f"/v1/safegene/families/{world.header.digest}/floor", json={"floor": {}})
    assert lifted.status_code == 200
    assert admin.delete("/v1/safegene/tenants/live").status_code == 200
    rejected(lambda: server.complete(secret["secret"], "live"), 404)
    assert server.http(ACME).get("/v1/safegene/tenants").status_code == 403


def test_a_second_replica_follows_and_may_be_killed_in_the_middle_of_a_change(
    server: Server, world: World
) -> None:
    other = Server(world)
    try:
        assert other.complete(ACME, "acme/support") == server.complete(ACME, "acme/support")
        added = world.add("acme/support", "support", [0.9, 0.9])
        for running in (server, other):
            running.follows(world.registry)
            assert running.complete(ACME, "acme/support")[0] == f"acme/support@{added.number}"
        last = world.registry.rollouts.list(limit=1)[0]
        reported(lambda: world.registry.rollouts.status(last.id).done)
        status = world.registry.rollouts.status(last.id)
        assert (status.applied, status.live) == (2, 2)
        changed = changes_until_it_dies(other)
        assert changed > 1
    finally:
        other.end()
    server.follows(world.registry)
    now = world.registry.tenants.get("acme/support").published
    assert server.complete(ACME, "acme/support")[0] == f"acme/support@{now}"
    assert now in (added.number + changed, added.number + changed + 1)
    again = world.add("acme/support", "support", [0.8, 0.8])
    server.follows(world.registry)
    assert server.complete(ACME, "acme/support")[0] == f"acme/support@{again.number}"
    assert_all_is_audited(world.registry)


def changes_until_it_dies(server: Server) -> int:
    """Change a profile through `server` again and again until it is killed; the number reported."""
    timer = threading.Timer(0.2, server.kill)
    reported = 0
    while True:
        scale = 0.9 if reported % 2 else 1 / 0.9
        try:
            response = server.http(ADMIN).patch(
                "/v1/safegene/tenants/acme%2Fsupport/profile", json={"scale": scale}
            )
        except httpx.HTTPError:
            timer.join()
            return reported
        assert response.status_code == 200, response.text
        reported += 1
        if reported == 2:
            timer.start()


def assert_all_is_audited(registry: Registry) -> None:
    """Every revision and every switch has its row, and no row is without its revision."""
    entries = registry.audit.page(limit=1000).entries
    named = [e.target for e in entries if e.action == "revision.add"]
    there = [
        r.served_name for t in registry.tenants.list() for r in registry.revisions.list(t.name)
    ]
    assert sorted(named) == sorted(there)
    rollouts = {r.id for r in registry.rollouts.list(limit=1000)}
    switches = {"tenant.publish", "tenant.rollback", "tenant.retire", "tenant.floor"}
    audited = {e.details["rollout"] for e in entries if e.action in switches}
    assert audited == rollouts


def test_killed_and_started_again_it_serves_what_is_published(server: Server, world: World) -> None:
    expected = {m.id: server.complete(ACME, m.id) for m in server.client(ACME).models.list().data}
    world.add("acme/support", "support", [0.2, 0.1])
    server.kill()
    again = Server(world)
    try:
        before = expected.pop("acme/support")
        assert again.complete(ACME, "acme/support")[0] != before[0]
        assert {name: again.complete(ACME, name) for name in expected} == expected
        applied = again.replica(world.registry).applied_version
        assert applied == world.registry.version()
    finally:
        again.end()
