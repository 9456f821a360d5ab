"""Routes of tenants: shapes, both forms of a name, a key's tenants, and rejections."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from artifact_files import a_profile
from tenant_setup import OURS, World, rejected, world

from safegene_server.access.middleware import AccessMiddleware, AccessSettings
from safegene_server.api import probes, tenants
from safegene_server.api.tenants import RESERVED
from safegene_server.artifacts import SourceRules
from safegene_server.error_responses import HIDDEN, EngineDownError
from safegene_vllm.errors import (
    AdapterRejectedError,
    HeaderError,
    ReceiptError,
    SafegeneError,
    StoreError,
)
from safegene_vllm.formats.profile import profile_json

__all__ = ["world"]

NAME = "acme/support"
JSON = {"content-type": "application/json"}
FORMS = ("/tenants/acme/support", "/tenants/acme%2Fsupport")
TENANT = {
    "name",
    "family",
    "source",
    "state",
    "limits",
    "published",
    "served",
    "failure",
    "created_at",
}
REVISION = {
    *("name", "tenant", "number", "kind", "adapter_digest", "profile_digest", "coefficients"),
    *("state", "reasons", "gate", "created_at", "created_by"),
}
JOB = {
    *("id", "kind", "tenant", "revision", "state", "progress", "message", "result", "attempts"),
    *("created_at", "updated_at"),
}
ROLLOUT = {
    *("id", "kind", "tenants", "revisions", "applied", "live", "done", "lagging"),
    *("created_at", "created_by"),
}


def test_from_registration_to_service(world: World) -> None:
    source = world.adapter()
    body = {"name": NAME, "source": source, "limits": {"concurrent": 4}}
    response = world.request("POST", "/tenants", body)
    assert response.status_code == 202
    begun = response.json()
    assert set(begun) == {"tenant", "job"}
    assert set(begun["tenant"]) == TENANT and set(begun["job"]) == JOB
    assert (begun["tenant"]["published"], begun["tenant"]["served"]) == (None, None)
    assert (begun["job"]["kind"], begun["job"]["state"]) == ("onboard", "queued")
    world.work()
    job = world.json("GET", f"/jobs/{begun['job']['id']}")
    assert (job["state"], job["progress"], job["revision"]) == ("done", 1.0, f"{NAME}@1")
    tenant = world.json("GET", "/tenants/acme/support")
    assert (tenant["served"], tenant["published"], tenant["source"]) == (f"{NAME}@1", 1, source)
    assert tenant["limits"] == {"concurrent": 4}
    listed = world.json("GET", "/tenants")
    assert listed == {"data": [tenant], "cursor": None}


def test_a_tenant_that_failed_can_be_added_again_or_given_up(world: World) -> None:
    bare = world.adapter(profile=None)
    world.json("POST", "/tenants", {"name": NAME, "source": bare})
    job = world.work()
    assert job.state == "failed"
    tenant = world.json("GET", "/tenants/acme/support")
    assert tenant["failure"] == f"job {job.id} failed: {job.message}" and tenant["served"] is None
    assert world.json("GET", "/tenants")["data"] == [tenant]
    # Given up, then added with what it lacked; then it has a history, and its name is taken.
    assert world.json("DELETE", "/tenants/acme/support")["tenant"]["state"] == "retired"
    assert world.json("GET", "/tenants/acme/support")["failure"] is None
    again = {"name": NAME, "source": bare, "coefficients": 0.5, "limits": {"concurrent": 2}}
    world.json("POST", "/tenants", again)
    assert world.work().state == "done"
    tenant = world.json("GET", "/tenants/acme/support")
    assert (tenant["served"], tenant["limits"]) == (f"{NAME}@1", {"concurrent": 2})
    assert tenant["failure"] is None
    other = {**again, "limits": {}}
    rejected(world.request("POST", "/tenants", other), 409, "exists and is active")
    world.json("DELETE", "/tenants/acme/support")
    rejected(world.request("POST", "/tenants", again), 409, "cannot be reused")
    actions = [entry.action for entry in world.registry.audit.page(target=NAME).entries]
    assert actions.count("tenant.restart") == 1


@pytest.mark.parametrize("path", FORMS)
def test_both_forms_of_a_name_reach_every_route(world: World, path: str) -> None:
    world.serve(NAME)
    assert world.json("GET", path)["name"] == NAME
    changed = world.json("PATCH", f"{path}/profile", {"scale": 2.0, "expected_revision": 1})
    assert set(changed) == {"revision", "rollout"}
    assert set(changed["revision"]) == REVISION and set(changed["rollout"]) == ROLLOUT
    assert changed["revision"]["name"] == f"{NAME}@2"
    assert changed["revision"]["coefficients"] == [2.0, 0.0, 2.0]
    rollout = changed["rollout"]
    assert (rollout["applied"], rollout["live"], rollout["done"]) == (1, 1, True)
    assert (rollout["tenants"], rollout["revisions"]) == ([NAME], [f"{NAME}@2"])
    assert world.json("POST", f"{path}/rollback")["revision"]["number"] == 1
    assert world.json("POST", f"{path}/publish", {"number": 2})["revision"]["number"] == 2
    assert world.json("POST", f"{path}/rollback", {"number": 1})["revision"]["number"] == 1
    numbers = [r["number"] for r in world.json("GET", f"{path}/revisions")["data"]]
    assert numbers == [1, 2]
    assert world.json("POST", f"{path}/freeze")["state"] == "frozen"
    rejected(world.request("PATCH", f"{path}/profile", {"scale": 1.5}), 409, "frozen")
    assert world.json("POST", f"{path}/unfreeze")["state"] == "active"
    limits = {"tokens_per_minute": 100}
    assert world.json("PUT", f"{path}/limits", limits)["limits"] == limits
    begun = world.json("POST", f"{path}/revisions", {"expected_revision": 1})
    assert begun["job"]["tenant"] == NAME and begun["tenant"]["published"] == 1
    assert world.work().state == "done"
    retired = world.json("DELETE", f"{path}?expected_revision=3")
    assert (retired["tenant"]["state"], retired["rollout"]["kind"]) == ("retired", "retire")
    assert world.json("DELETE", path)["rollout"] is None


def test_every_form_of_coefficients(world: World) -> None:
    world.serve(NAME)
    path = "/tenants/acme/support/profile"
    for body, expected in (
        ({"coefficients": 0.5}, [0.5, 0.0, 0.5]),
        ({"coefficients": [1, 0, 2]}, [1.0, 0.0, 2.0]),
        ({"layers": {"2": 1.25}}, [1.0, 0.0, 1.25]),
        ({"scale": 0.5}, [0.5, 0.0, 0.625]),
        ({"profile": profile_json(a_profile(0.25))}, [0.25, 0.0, 0.25]),
    ):
        assert world.json("PATCH", path, body)["revision"]["coefficients"] == expected


def test_given_coefficients_need_no_profile_in_the_source(world: World) -> None:
    bare = world.adapter(profile=None)
    world.json("POST", "/tenants", {"name": NAME, "source": bare, "layers": {"2": 1.5}})
    assert world.work().state == "done"
    (revision,) = world.json("GET", "/tenants/acme/support/revisions")["data"]
    assert revision["coefficients"] == [0.0, 0.0, 1.5]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "name"),
        ({"name": "Acme Support"}, "name"),
        ({"name": "a/b/c"}, "name"),
        ({"name": NAME}, "neither a source nor a profile"),
        ({"name": NAME, "source": ""}, "source"),
        ({"name": NAME, "coefficients": 99}, "expected"),
        ({"name": NAME, "coefficients": [1]}, "1 coefficients"),
        ({"name": NAME, "profile": {"kind": "family"}}, "profile"),
        ({"name": NAME, "coefficients": 1, "layers": {"0": 1}}, "expected one of them"),
        ({"name": NAME, "coefficients": 1, "limits": {"concurrent": 0}}, "limits.concurrent"),
        ({"name": NAME, "coefficients": 1, "limits": {"requests": 1}}, "limits.requests"),
        ({"name": NAME, "coefficients": 1, "sauce": "x"}, "sauce"),
        ({"name": "base", "coefficients": 1}, "base"),
    ],
)
def test_registrations_that_cannot_be(world: World, body: dict[str, Any], words: str) -> None:
    response = world.request("POST", "/tenants", body)
    assert response.status_code in (400, 409)
    rejected(response, response.status_code, words)
    assert world.registry.tenants.list() == () and world.registry.jobs.list() == ()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"null", b"[]", b'"x"', b"\xff", b'{"name": NaN}', b"[" * 100_000]
)
def test_bodies_that_are_none(world: World, content: bytes) -> None:
    for method, path in (("POST", "/tenants"), ("PATCH", "/tenants/acme/profile")):
        rejected(world.request(method, path, content=content, headers=JSON), 400)


def test_deep_calibration_records_are_no_way_to_break_the_server(world: World) -> None:
    world.serve(NAME)
    deep: Any = {}
    for _ in range(400):
        deep = {"a": deep}
    body = {"profile": {**profile_json(a_profile(2.0)), "calibration": deep}}
    rejected(world.request("PATCH", "/tenants/acme/support/profile", body), 400)


def test_numbers_that_no_float_can_be_are_rejected(world: World) -> None:
    world.serve(NAME)
    huge = 10**400
    whole = {**profile_json(a_profile(2.0)), "coefficients": [huge, 0, 1]}
    for body in ({"profile": whole}, {"coefficients": [huge, 0, 1]}, {"scale": huge}):
        rejected(world.request("PATCH", "/tenants/acme/support/profile", body), 400)


@pytest.mark.parametrize("body", [{"\ud800": 1}, {"name": "\ud800", "coefficients": 1.0}])
def test_an_unpaired_surrogate_is_rejected(world: World, body: dict[str, Any]) -> None:
    rejected(world.request("POST", "/tenants", content=json.dumps(body), headers=JSON), 400)


def test_a_body_over_the_limit_is_rejected_while_reading(world: World) -> None:
    world.access = AccessMiddleware(world.app, world.catalog, AccessSettings(max_body_bytes=1000))

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b"x" * 500

    rejected(world.request("POST", "/tenants", content=pieces(), headers=JSON), 413, "1000 bytes")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-32"])
def test_a_body_of_more_values_than_any_has_is_not_parsed(
    world: World, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    def loads(*_: Any, **__: Any) -> None:
        raise AssertionError("the body was parsed")

    content = f'{{"coefficients": [{"[]," * 20_000}0]}}'.encode(encoding)
    with monkeypatch.context() as patch:
        patch.setattr("starlette.requests.json.loads", loads)
        response = world.request(
            "PATCH", "/tenants/acme/support/profile", content=content, headers=JSON
        )
    words = "more than 20000 objects and lists" if encoding == "utf-8" else "the body is not"
    rejected(response, 400, words)


def test_the_errors_of_a_body_are_named_up_to_a_number(world: World) -> None:
    body = {"name": NAME, "coefficients": ["x"] * 500}
    message = rejected(world.request("POST", "/tenants", body), 400)
    assert len(message) < 2000 and message.endswith("; and 481 more")
    assert message.count("coefficients") == 20


def test_so_many_jobs_of_one_tenant_may_wait_and_no_more(world: World) -> None:
    world.serve(NAME)
    world.serve("other", start=5)
    path = "/tenants/acme/support/revisions"
    for _ in range(tenants.MAX_QUEUED):
        world.json("POST", path, {})
    rejected(world.request("POST", path, {}), 409, "jobs of tenant 'acme/support' wait already")
    examples = {"safety": [{"prompt": "a"}], "task": [{"prompt": "b", "answer": "c"}]}
    calibrate = {"examples": examples}
    path = "/tenants/acme/support/calibrate"
    rejected(world.request("POST", path, calibrate), 409, "wait already")
    assert world.json("POST", "/tenants/other/revisions", {})
    world.work()
    assert world.json("POST", "/tenants/acme/support/revisions", {})


@pytest.mark.parametrize("kind", ["safety", "task", "benign"])
def test_examples_are_a_thousand_at_most(world: World, kind: str) -> None:
    examples: dict[str, Any] = {"safety": [], "task": []}
    examples[kind] = [{"prompt": "a", "answer": "b"}] * 1001
    response = world.request("POST", "/tenants/acme/support/calibrate", {"examples": examples})
    rejected(response, 400, "at most 1000 items")
    assert response.json()["error"]["param"] == f"examples.{kind}"


def test_words_of_the_api_are_no_second_part_of_a_name(world: World) -> None:
    routes = (*tenants.router.routes, *probes.router.routes)
    paths = {route.path for route in routes}  # type: ignore[attr-defined]
    used = {path.rpartition("}/")[2] for path in paths if "}/" in path}
    assert used == RESERVED
    for word in sorted(RESERVED):
        body = {"name": f"acme/{word}", "coefficients": 1.0}
        rejected(world.request("POST", "/tenants", body), 400, "words of this API")
    assert world.json("POST", "/tenants", {"name": "freeze", "coefficients": 1.0})
    assert world.work().state == "done"
    assert world.json("POST", "/tenants/freeze/freeze")["state"] == "frozen"


def test_a_key_for_some_tenants_knows_no_others(world: World) -> None:
    world.serve(NAME)
    world.serve("other", start=5)
    assert [t["name"] for t in world.json("GET", "/tenants", key="acme")["data"]] == [NAME]
    before = world.registry.version()
    for method, path, body in (
        ("GET", "/tenants/{}", None),
        ("DELETE", "/tenants/{}", None),
        ("GET", "/tenants/{}/revisions", None),
        ("POST", "/tenants/{}/revisions", {}),
        ("PATCH", "/tenants/{}/profile", {"scale": 2}),
        ("POST", "/tenants/{}/publish", {"number": 1}),
        ("POST", "/tenants/{}/rollback", {}),
        ("POST", "/tenants/{}/freeze", None),
        ("POST", "/tenants/{}/unfreeze", None),
        ("PUT", "/tenants/{}/limits", {}),
    ):
        theirs = rejected(world.request(method, path.format("other"), body, key="acme"), 404)
        none = rejected(world.request(method, path.format("absent"), body, key="acme"), 404)
        assert theirs.replace("other", "absent") == none
        real = rejected(world.request(method, path.format("absent"), body), 404)
        assert real == none
    body = {"name": "other", "coefficients": 1.0}
    rejected(world.request("POST", "/tenants", body, key="acme"), 404)
    assert world.registry.version() == before
    body = {"name": "acme", "coefficients": 1.0}
    assert world.json("POST", "/tenants", body, key="acme")["tenant"]["name"] == "acme"


def test_scopes(world: World) -> None:
    world.serve(NAME)
    assert world.json("GET", "/tenants", key="read")["data"]
    rejected(world.request("POST", "/tenants/acme/support/freeze", key="read"), 403)
    rejected(world.request("GET", "/tenants", key="serve"), 403)
    rejected(world.request("GET", "/tenants", key="sg-absent"), 401)


def test_the_engines_error_is_in_the_response(world: World) -> None:
    world.serve(NAME)
    path = "/tenants/acme/support/profile"
    for error, status in (
        (AdapterRejectedError("no free slot"), 400),
        (ReceiptError("rank 1 differs"), 500),
        (EngineDownError("dead"), 503),
    ):
        world.replica.errors["load"] = error
        rejected(world.request("PATCH", path, {"scale": 1.5}), status, str(error))
    world.replica.errors["load"] = RuntimeError("a secret")
    assert "secret" not in rejected(world.request("PATCH", path, {"scale": 1.5}), 500)
    assert world.json("GET", "/tenants/acme/support")["published"] == 1


def test_the_actor_is_the_name_of_the_key(world: World) -> None:
    world.serve(NAME)
    world.json("PATCH", "/tenants/acme/support/profile", {"scale": 2}, key="acme")
    assert world.json("GET", "/tenants/acme/support/revisions")["data"][1]["created_by"] == "acme"
    entry = world.json("GET", "/audit", params={"action": "tenant.publish"})["data"][0]
    assert (entry["actor"], entry["target"]) == ("acme", f"{NAME}@2")


def test_without_a_registry_every_route_says_so(world: World) -> None:
    world.app.state.safegene.tenants = None
    rejected(world.request("GET", "/tenants"), 409, "runs without a registry")
    body = {"name": NAME, "coefficients": 1.0}
    rejected(world.request("POST", "/tenants", body), 409, "runs without a registry")
    del world.app.state.safegene
    rejected(world.request("GET", "/families"), 409, "runs without a registry")


def test_no_response_names_a_path_of_the_store(world: World) -> None:
    world.serve(NAME)
    world.json("PATCH", "/tenants/acme/support/profile", {"scale": 2})
    store = str(Path(world.store.root))
    paths = ("/tenants", "/tenants/acme/support/revisions", "/jobs", "/rollouts", "/audit")
    for path in paths:
        assert store not in json.dumps(world.json("GET", path)), OURS + path


@pytest.mark.parametrize(
    ("error", "status", "shown"),
    [
        (StoreError("PATH is full", public="the store is full"), 507, "the store is full"),
        (StoreError("PATH cannot be written.\nPATH: it is\u00a0full"), 507, HIDDEN),
        (AdapterRejectedError("acme@2: PATH/x has rank 64"), 400, HIDDEN),
        (HeaderError("PATH: no JSON"), 400, HIDDEN),
        (ReceiptError("PATH was not applied"), 500, HIDDEN),
        (EngineDownError("the engine is down: PATH"), 503, HIDDEN),
        (RuntimeError("PATH"), 500, "the server's log says why"),
    ],
)
def test_messages_name_no_path_of_the_store(
    world: World, caplog: pytest.LogCaptureFixture, error: Exception, status: int, shown: str
) -> None:
    world.serve(NAME)
    store = str(world.store.root)
    error.args = (str(error).replace("PATH", f"{store}/revisions/ab-cd"),)
    world.replica.errors["load"] = error
    path = "/tenants/acme/support"
    response = world.request("PATCH", f"{path}/profile", {"scale": 1.5})
    rejected(response, status, shown)
    assert store not in response.text and store in caplog.text
    caplog.clear()
    world.json("POST", f"{path}/revisions", {})
    job = world.work()
    assert store in caplog.text
    if isinstance(error, SafegeneError):
        assert job.message == shown
        assert world.json("GET", f"{path}/revisions")["data"][-1]["reasons"] == [shown]
    for route in (f"{path}/revisions", "/jobs", "/jobs/2", "/audit?target=acme/support"):
        assert store not in world.request("GET", route).text, route


def test_a_full_disk_is_reported_without_the_path_of_the_store(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.serve(NAME)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    response = world.request("PATCH", "/tenants/acme/support/profile", {"scale": 1.5})
    assert "No space left" in rejected(response, 507, "this server's store cannot be written")
    assert str(world.store.root) not in response.text


def test_paths_that_only_begin_like_the_store_are_unchanged(world: World) -> None:
    for name, source in (
        ("one", f"{world.store.root}-not"),
        ("two", f"/srv{world.store.root}/x"),
    ):
        body = {"name": name, "source": source}
        assert world.json("POST", "/tenants", body)["tenant"]["source"] == source
        world.work()
        assert source in world.json("GET", "/jobs")["data"][0]["message"]


def test_a_key_for_some_tenants_names_no_source_but_their_own_folder(world: World) -> None:
    world.serve(NAME)
    other = world.adapter("other", start=5)
    root = world.root / "sources"
    world.store.rules = SourceRules(roots=(root,))
    for source in ("/etc", other, "s3://models/acme", str(root), str(root / NAME / "x")):
        body = {"source": source}
        response = world.request("POST", "/tenants/acme/support/revisions", body, key="acme")
        assert str(root) not in rejected(response, 403, "a key for some tenants").replace(
            source, ""
        )
        response = world.request("POST", "/tenants", {"name": "acme", **body}, key="acme")
        rejected(response, 403, "a key for some tenants")
        rejected(world.request("POST", "/tenants", {"name": "other", **body}, key="acme"), 404)
    path = "/tenants/acme/support/revisions"
    rejected(world.request("POST", path, {"source": str(root / "acme")}, key="acme"), 403)
    assert world.json("POST", path, {"source": str(root / NAME)}, key="acme")
    assert world.json("POST", "/tenants/acme/support/revisions", {}, key="acme")


def test_only_the_log_names_the_roots_of_sources(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    roots = (world.root / "one", world.root / "two")
    world.store.rules = SourceRules(roots=roots)
    world.json("POST", "/tenants", {"name": NAME, "source": "/no/where"})
    assert world.work().state == "failed"
    assert f"the allowed roots ({roots[0]}, {roots[1]}); move" in caplog.text
    for key in ("admin", "acme"):
        message = world.json("GET", "/jobs", key=key)["data"][0]["message"]
        assert "/no/where is outside the allowed roots; move" in message
