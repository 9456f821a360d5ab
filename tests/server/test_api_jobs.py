"""The routes of jobs: whose they are, and how they are ended."""

from __future__ import annotations

from typing import Any

from tenant_setup import World, refused, world

__all__ = ["world"]


def begin(world: World, name: str) -> Any:
    return world.told("POST", "/tenants", {"name": name, "coefficients": 1.0})["job"]


def test_jobs_are_listed_the_newest_first_and_filtered(world: World) -> None:
    first, second = begin(world, "acme"), begin(world, "other")
    assert world.told("GET", "/jobs") == {"data": [second, first], "cursor": None}
    assert world.told("GET", "/jobs", params={"tenant": "acme"})["data"] == [first]
    assert world.told("GET", "/jobs", params={"state": "done"})["data"] == []
    assert world.told("GET", "/jobs", params={"limit": 1})["data"] == [second]
    refused(world.ask("GET", "/jobs", params={"limit": 0}), 400, "limit")
    refused(world.ask("GET", "/jobs", params={"state": "odd"}), 400, "state")


def test_a_waiting_job_is_cancelled_at_once_and_twice(world: World) -> None:
    job = begin(world, "acme")
    for _ in range(2):
        assert world.told("POST", f"/jobs/{job['id']}/cancel")["state"] == "cancelled"
    other = begin(world, "other")
    assert world.work().state == "done"
    refused(world.ask("POST", f"/jobs/{other['id']}/cancel"), 409, "is done")


def test_a_failed_job_says_why(world: World) -> None:
    job = world.told("POST", "/tenants", {"name": "acme", "source": "/no/where"})["job"]
    world.work()
    found = world.told("GET", f"/jobs/{job['id']}")
    assert found["state"] == "failed" and "/no/where" in found["message"]


def test_a_key_for_some_tenants_sees_their_jobs(world: World) -> None:
    first, second = begin(world, "acme"), begin(world, "other")
    third = begin(world, "acme/support")
    assert world.told("GET", "/jobs", key="acme")["data"] == [third, first]
    refused(world.ask("GET", "/jobs", params={"tenant": "other"}, key="acme"), 404)
    for method, path in (("GET", "/jobs/{}"), ("POST", "/jobs/{}/cancel")):
        theirs = refused(world.ask(method, path.format(second["id"]), key="acme"), 404)
        none = refused(world.ask(method, path.format(777), key="acme"), 404)
        assert theirs.replace(str(second["id"]), "777") == none
    assert world.registry.jobs.get(second["id"]).state == "queued"
    refused(world.ask("GET", "/jobs/0"), 400)
    refused(world.ask("GET", f"/jobs/{10**30}"), 400)
