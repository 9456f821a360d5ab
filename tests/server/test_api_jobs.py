"""The routes of jobs: whose they are, and how they are ended."""

from __future__ import annotations

from typing import Any

from tenant_setup import World, rejected, world

__all__ = ["world"]


def begin(world: World, name: str) -> Any:
    return world.json("POST", "/tenants", {"name": name, "coefficients": 1.0})["job"]


def test_jobs_are_listed_the_newest_first_and_filtered(world: World) -> None:
    first, second = begin(world, "acme"), begin(world, "other")
    assert world.json("GET", "/jobs") == {"data": [second, first], "cursor": None}
    assert world.json("GET", "/jobs", params={"tenant": "acme"})["data"] == [first]
    assert world.json("GET", "/jobs", params={"state": "done"})["data"] == []
    assert world.json("GET", "/jobs", params={"limit": 1})["data"] == [second]
    rejected(world.request("GET", "/jobs", params={"limit": 0}), 400, "limit")
    rejected(world.request("GET", "/jobs", params={"state": "odd"}), 400, "state")


def test_a_waiting_job_is_cancelled_at_once_and_twice(world: World) -> None:
    job = begin(world, "acme")
    for _ in range(2):
        assert world.json("POST", f"/jobs/{job['id']}/cancel")["state"] == "cancelled"
    other = begin(world, "other")
    assert world.work().state == "done"
    rejected(world.request("POST", f"/jobs/{other['id']}/cancel"), 409, "is done")


def test_a_failed_job_says_why(world: World) -> None:
    job = world.json("POST", "/tenants", {"name": "acme", "source": "/no/where"})["job"]
    world.work()
    found = world.json("GET", f"/jobs/{job['id']}")
    assert found["state"] == "failed" and "/no/where" in found["message"]


def test_a_key_for_some_tenants_sees_their_jobs(world: World) -> None:
    first, second = begin(world, "acme"), begin(world, "other")
    third = begin(world, "acme/support")
    assert world.json("GET", "/jobs", key="acme")["data"] == [third, first]
    rejected(world.request("GET", "/jobs", params={"tenant": "other"}, key="acme"), 404)
    for method, path in (("GET", "/jobs/{}"), ("POST", "/jobs/{}/cancel")):
        theirs = rejected(world.request(method, path.format(second["id"]), key="acme"), 404)
        none = rejected(world.request(method, path.format(777), key="acme"), 404)
        assert theirs.replace(str(second["id"]), "777") == none
    assert world.registry.jobs.get(second["id"]).state == "queued"
    rejected(world.request("GET", "/jobs/0"), 400)
    rejected(world.request("GET", f"/jobs/{10**30}"), 400)
