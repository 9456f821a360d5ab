"""Routes of probes and their job: visible tenants and rejections."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from probes_setup import PROMPTS, ProbeWorld, probes, sample, series_of
from tenant_setup import rejected

from safegene_server.registry import Job

__all__ = ["probes"]

NAME = "acme/support"


def begin(world: ProbeWorld, key: str = "admin") -> int:
    started = world.json("POST", f"/tenants/{NAME}/probe", key=key)
    assert started["tenant"]["name"] == NAME and started["job"]["kind"] == "probe"
    return int(started["job"]["id"])


@pytest.fixture
def world(probes: ProbeWorld) -> ProbeWorld:
    """Two tenants, and the world's own prober, which is switched off."""
    probes.publish(NAME)
    probes.publish("globex")
    return probes


def test_a_probe_now_is_a_job_and_then_in_the_list(world: ProbeWorld) -> None:
    (mine,) = world.json("GET", "/probes", key="acme")["data"]
    assert mine == {
        "tenant": NAME,
        "served": f"{NAME}@1",
        "outcome": None,
        "message": "",
        "result": None,
    }
    job = begin(world)
    assert begin(world) == job, "the same again is the same job"
    done = world.work()
    assert (done.id, done.state) == (job, "done")
    assert "0 of 12 harmful prompts not refused" in done.message
    (mine,) = world.json("GET", "/probes", key="acme")["data"]
    result = mine["result"]
    assert mine["outcome"] == "ok" and result == done.result
    assert result["attack_success"] == {"rate": 0.0, "n": 12}
    assert result["over_refusal"] == {"rate": 0.0, "n": 24}
    assert result["coherent"] == {"rate": 1.0, "n": 36}
    assert result["judges"] == ["strings:opening", "coherence"]
    assert (result["revision"], result["replica"]) == (f"{NAME}@1", world.replica.id)
    assert world.json("GET", f"/jobs/{job}")["revision"] == f"{NAME}@1"
    assert begin(world) != job


def test_a_key_sees_its_own(world: ProbeWorld) -> None:
    secret = "g" * 40
    world.registry.keys.add("g", scopes=["read"], tenants=["globex"], actor="t", secret=secret)
    asyncio.run(world.replica.apply())
    for key, names in (("read", {NAME, "globex"}), ("acme", {NAME}), (secret, {"globex"})):
        found = world.json("GET", "/probes", key=key)["data"]
        assert {probe["tenant"] for probe in found} == names
    rejected(world.request("GET", "/probes", key="serve"), 403, "needs the scope `read`")
    rejected(
        world.request("POST", f"/tenants/{NAME}/probe", key="read"), 403, "needs the scope `admin`"
    )
    foreign = rejected(world.request("POST", "/tenants/globex/probe", key="acme"), 404)
    unknown = rejected(world.request("POST", "/tenants/absent/probe", key="acme"), 404)
    assert foreign.replace("globex", "X") == unknown.replace("absent", "X")
    assert begin(world, key="acme")


def test_probing_a_tenant_that_serves_nothing_is_rejected(world: ProbeWorld) -> None:
    world.json("DELETE", f"/tenants/{NAME}")
    rejected(world.request("POST", f"/tenants/{NAME}/probe"), 409, "serves nothing to probe")
    world.app.state.safegene.prober = None
    rejected(world.request("GET", "/probes"), 409, "without a registry")


def test_a_replica_that_does_not_serve_it_says_so(world: ProbeWorld) -> None:
    begin(world)
    world.replica.held.clear()
    done = world.work()
    assert done.state == "failed" and "not served by this server" in done.message
    assert sample("runs_total", tenant=NAME, outcome="failed") is None


def test_a_cancelled_probe_job_stops_sending_prompts(world: ProbeWorld) -> None:
    job = begin(world)
    original: Callable[[str], str] = world.replica.complete

    def cancel(prompt: str) -> str:
        if len(world.replica.requested) == 12:
            world.registry.jobs.cancel(job, actor="test")
        return original(prompt)

    world.replica.complete = cancel
    done: Job = world.work()
    assert (done.id, done.state) == (job, "cancelled")
    assert 12 <= len(world.replica.requested) < len(PROMPTS)
    assert series_of(NAME) == set()
    assert sample("runs_total", tenant=NAME, outcome="skipped") == 1.0
