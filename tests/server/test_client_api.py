"""The client and the commands against the real routes: registry, store and access real, no engine.

The routes respond in the client's shapes, and every route has a method.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from starlette.routing import Match
from tenant_server import served
from tenant_setup import SECRETS, World

from safegene_server.api import router
from safegene_server.registry import UsageRow
from safegene_vllm.cli import main
from safegene_vllm.client import ApiError, Client

NAME = "acme/support"
Run = Callable[..., Any]


class Server:
    """The app as the client finds it, with its jobs running; records the requested routes."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.routes: set[str] = set()
        self._jobs: asyncio.Task[None] | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self._jobs is None:
            self._jobs = asyncio.create_task(self.world.jobs.run())
        for route in router.routes:
            if route.matches(scope)[0] is Match.FULL:
                self.routes.add(f"{scope['method']} {route.path}")
                break
        await self.world.access(scope, receive, send)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    world = World(tmp_path)
    yield Server(world)
    world.registry.close()


@pytest.fixture
def client(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    with served(server) as url:
        monkeypatch.setenv("SAFEGENE_URL", url)
        monkeypatch.setenv("SAFEGENE_KEY", SECRETS["admin"])
        with Client(url, SECRETS["admin"]) as client:
            yield client


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command that must succeed; its JSON."""

    def call(*words: object) -> Any:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([*map(str, words), "--json"])
        out, err = capsys.readouterr()
        assert not exit_.value.code, err
        return json.loads(out)

    return call


def test_a_tenants_life_and_every_route(server: Server, client: Client, run: Run) -> None:
    source = server.world.adapter("support")
    added = run("tenant", "add", NAME, "--source", source, "--limit", "concurrent=8")
    assert added["job"]["state"] == "done" and added["rollout"]["done"] is True
    assert (added["tenant"]["served"], added["tenant"]["limits"]) == (
        f"{NAME}@1",
        {"concurrent": 8},
    )
    # Seen shortly before: this replica sends a heartbeat only when it follows a change.
    assert [replica["host"] for replica in run("replica", "list")["data"]] == ["host"]
    before = client.revisions(NAME)[0]["coefficients"]

    changed = run("tenant", "set", NAME, "--scale", 2, "--expect", 1)
    assert changed["revision"]["coefficients"] == [2 * value for value in before]
    assert changed["rollout"]["done"] is True
    assert run("tenant", "set", NAME, "--scale", 1.25, "--expect", 2)["revision"]["number"] == 3
    with pytest.raises(ApiError) as caught:
        client.change_profile(NAME, scale=2.0, expected_revision=1)
    assert caught.value.status == 409
    assert (
        run("tenant", "set", NAME, "--coefficients", "0:0.5")["revision"]["coefficients"][0] == 0.5
    )
    assert run("tenant", "rollback", NAME, "--to", 2)["revision"]["name"] == f"{NAME}@2"
    assert client.tenant(NAME)["served"] == f"{NAME}@2"

    ready = run("tenant", "update", NAME, "--coefficient", 0.25, "--no-publish")
    assert ready["job"]["state"] == "done" and ready["tenant"]["published"] == 2
    number = client.revisions(NAME)[-1]["number"]
    assert run("tenant", "publish", NAME, number)["revision"]["state"] == "published"

    assert run("tenant", "set", NAME, "--limit", "none")["limits"] == {}
    assert run("tenant", "freeze", NAME)["state"] == "frozen"
    with pytest.raises(ApiError, match="frozen"):
        client.rollback(NAME)
    assert run("tenant", "unfreeze", NAME)["state"] == "active"

    (family,) = run("family", "list")["data"]
    digest, layer = family["digest"], family["layers"][0]
    assert client.family(digest).model_dump(mode="json") == family
    raised = run("family", "floor", digest, f"{layer}:0.75")
    assert raised["family"]["floor"] == {str(layer): 0.75} and raised["rollout"]["done"] is True
    assert client.revisions(NAME)[-1]["coefficients"][layer] == 0.75
    assert run("family", "freeze", digest)["frozen"] is True
    assert run("family", "unfreeze", digest)["frozen"] is False

    made = run("key", "add", "app", "--tenant", NAME, "--scope", "read", "--expires", "90d")
    with Client(os.environ["SAFEGENE_URL"], made["secret"]) as other:
        assert other.whoami()["tenants"] == [NAME]
        assert [tenant["name"] for tenant in other.tenants()] == [NAME]
        rotated = client.rotate_key("app")
        with pytest.raises(ApiError) as caught:
            other.tenants()
        assert caught.value.status == 401 and rotated["secret"] != made["secret"]
    assert run("key", "revoke", "app")["revoked_at"] is not None
    assert {key["name"] for key in run("key", "list")["data"]} == {*SECRETS, "app"}

    rows = [{"prompt": f"p {n}", "answer": "ab"[n % 2]} for n in range(6)]
    examples = {"safety": rows, "task": rows}
    started = client.calibrate(NAME, examples, evaluations=5, expected_revision=None)
    assert (started["tenant"]["name"], started["job"]["kind"]) == (NAME, "calibrate")
    given = {"examples": examples, "data": {"task": {"name": "p"}}, "seed": 1, "evaluations": 5}
    started = client.add_tenant("acme", source=source, calibrate=given)
    assert (started["tenant"]["name"], started["job"]["kind"]) == ("acme", "calibrate")
    assert client.add_tenant("acme", source=source, calibrate=given)["job"] == started["job"]
    started = client.add_revision("acme", calibrate=given, expected_revision=0)
    assert started["job"]["kind"] == "calibrate"
    with pytest.raises(ApiError, match="calibrate and coefficients are given"):
        client.add_tenant("other", source=source, coefficients=1.0, calibrate=given)

    done = client.jobs(tenant=NAME, state="done", limit=1)[0].model_dump(mode="json")
    assert run("job", "show", done["id"]) == run("job", "watch", done["id"]) == done
    with pytest.raises(ApiError) as caught:
        client.cancel_job(done["id"])
    assert caught.value.status == 409
    rollout = client.rollouts(limit=1)[0]
    assert (
        run("rollout", "watch")["id"]
        == rollout["id"]
        == run("rollout", "show", rollout["id"])["id"]
    )

    probed = run("probe", "run", NAME)["job"]
    assert probed["state"] == "done" and probed["revision"] == client.tenant(NAME)["served"]
    (standing,) = run("probe", "list")["data"]
    assert (
        standing == client.probes()[0].model_dump(mode="json")
        and standing["result"] == probed["result"]
    )
    assert standing["outcome"] == "ok" and standing["result"]["coherent"]["n"] == 36

    assert run("tenant", "retire", NAME)["tenant"]["state"] == "retired"
    page = run("audit", "--target", NAME, "--since", "1h", "--limit", 3)
    older = run("audit", "--target", NAME, "--limit", 1, "--cursor", page["cursor"])
    assert len(page["data"]) == 3 and older["data"][0]["id"] < page["data"][-1]["id"]

    day = date(2031, 5, 1)
    server.world.registry.usage.add(UsageRow(day, NAME, f"k{n}", 1, 7, 3) for n in range(1001))
    used = client.usage(tenant=NAME)
    assert len(used) == 1001 and (used[0].day, used[0].requests) == (day, 1)
    (row,) = run("usage", "--since", "2031-05-01", "--key-name", "k7")["data"]
    assert row == used[[row.key for row in used].index("k7")].model_dump(mode="json")

    every = {f"{method} {route.path}" for route in router.routes for method in route.methods}
    assert server.routes == every


def test_a_tenant_that_fails_is_shown_with_its_reasons(
    server: Server, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    source = server.world.adapter("bare", profile=None)
    with pytest.raises(SystemExit) as exit_:
        main(["tenant", "add", NAME, "--source", source])
    assert exit_.value.code == 1
    assert "has no profile" in capsys.readouterr().err
    assert client.tenant(NAME)["served"] is None


def test_new_content_has_examples_in_place_of_coefficients(server: Server, client: Client) -> None:
    source = server.world.adapter("bare", profile=None)
    rows = [{"prompt": f"p {n}", "answer": "ab"[n % 2]} for n in range(6)]
    examples = {"safety": rows, "task": rows}
    given = {"examples": examples, "data": {"task": {"name": "p"}}, "seed": 1, "evaluations": 5}
    started = client.add_tenant(NAME, source=source, calibrate=given)
    assert (started["tenant"]["name"], started["job"]["kind"]) == (NAME, "calibrate")
    assert client.add_tenant(NAME, source=source, calibrate=given)["job"] == started["job"]
    again = client.add_revision(NAME, calibrate=given, expected_revision=0)
    assert again["job"]["kind"] == "calibrate" and again["job"]["id"] != started["job"]["id"]
    with pytest.raises(ApiError, match="calibrate and coefficients are given"):
        client.add_tenant("other", source=source, coefficients=1.0, calibrate=given)
    with pytest.raises(ApiError, match="has no revision"):
        client.calibrate(NAME, examples, evaluations=5)
