"""The client against a real server on loopback: its requests, errors and retries."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from launched_server import free_port
from tenant_server import AT, FAMILY, KEY, SECRET, World, app_of, error, served

from safegene_vllm.cli.client_options import as_dict
from safegene_vllm.client import ApiError, AsyncClient, Client
from safegene_vllm.client.connection import MAX_PAUSE_S, service_url
from safegene_vllm.errors import ConfigError

NAME = "acme/support"


@pytest.fixture(scope="module")
def world_there() -> Iterator[World]:
    world = World()
    with served(app_of(world)) as url:
        world.url = url
        yield world


@pytest.fixture
def world(world_there: World) -> World:
    """The running server, as if it were new, with one tenant of two revisions."""
    url = world_there.url
    world_there.__init__(url=url)
    world_there.tenant(NAME)
    world_there.revision(NAME, [0.0, 0.5])
    world_there.revision(NAME, [0.0, 0.7])
    return world_there


@pytest.fixture
def client(world: World) -> Iterator[Client]:
    with Client(world.url, KEY, first_pause_s=0.01) as client:
        yield client


Call = Callable[[Client], Any]
EXAMPLES = {
    "safety": [{"prompt": "p", "answer": None}],
    "task": [{"prompt": "q", "answer": "a"}],
}
CALLS: list[tuple[Call, str, str, Any]] = [
    (lambda c: c.whoami(), "GET", "/whoami", None),
    (lambda c: c.tenants(), "GET", "/tenants", None),
    (lambda c: c.tenant(NAME), "GET", "/tenants/acme/support", None),
    (
        lambda c: c.add_tenant(
            NAME, source="s3://b/acme", coefficients=[0.5, 1], limits={"concurrent": 8}
        ),
        "POST",
        "/tenants",
        {
            "name": NAME,
            "source": "s3://b/acme",
            "coefficients": [0.5, 1],
            "limits": {"concurrent": 8},
        },
    ),
    (
        lambda c: c.add_tenant(NAME, layers={3: 0.5}, publish=False),
        "POST",
        "/tenants",
        {"name": NAME, "layers": {"3": 0.5}, "publish": False},
    ),
    (
        lambda c: c.add_tenant(NAME, source="s3://b/acme", calibrate={"examples": EXAMPLES}),
        "POST",
        "/tenants",
        {"name": NAME, "source": "s3://b/acme", "calibrate": {"examples": EXAMPLES}},
    ),
    (
        lambda c: c.add_revision(NAME, calibrate={"examples": EXAMPLES, "seed": 2}),
        "POST",
        "/tenants/acme/support/revisions",
        {"calibrate": {"examples": EXAMPLES, "seed": 2}},
    ),
    (lambda c: c.retire_tenant(NAME), "DELETE", "/tenants/acme/support", None),
    (lambda c: c.revisions(NAME), "GET", "/tenants/acme/support/revisions", None),
    (
        lambda c: c.add_revision(NAME, profile={"kind": "profile"}, expected_revision=3),
        "POST",
        "/tenants/acme/support/revisions",
        {"profile": {"kind": "profile"}, "expected_revision": 3},
    ),
    (
        lambda c: c.change_profile(NAME, scale=1.5, expected_revision=0),
        "PATCH",
        "/tenants/acme/support/profile",
        {"scale": 1.5, "expected_revision": 0},
    ),
    (
        lambda c: c.change_profile(NAME, coefficients=0.0),
        "PATCH",
        "/tenants/acme/support/profile",
        {"coefficients": 0.0},
    ),
    (lambda c: c.publish(NAME, 2), "POST", "/tenants/acme/support/publish", {"number": 2}),
    (lambda c: c.probes(), "GET", "/probes", None),
    (lambda c: c.probe(NAME), "POST", "/tenants/acme/support/probe", {}),
    (lambda c: c.rollback(NAME), "POST", "/tenants/acme/support/rollback", {}),
    (lambda c: c.rollback(NAME, 1), "POST", "/tenants/acme/support/rollback", {"number": 1}),
    (lambda c: c.freeze_tenant(NAME), "POST", "/tenants/acme/support/freeze", {}),
    (lambda c: c.unfreeze_tenant(NAME), "POST", "/tenants/acme/support/unfreeze", {}),
    (
        lambda c: c.set_limits(NAME, {"concurrent": 2}),
        "PUT",
        "/tenants/acme/support/limits",
        {"concurrent": 2},
    ),
    (
        lambda c: c.calibrate(NAME, EXAMPLES, seed=3),
        "POST",
        "/tenants/acme/support/calibrate",
        {"examples": EXAMPLES, "seed": 3},
    ),
    (
        lambda c: c.calibrate(NAME, EXAMPLES, publish=False),
        "POST",
        "/tenants/acme/support/calibrate",
        {"examples": EXAMPLES, "seed": 0, "publish": False},
    ),
    (lambda c: c.ready(), "GET", "/ready", None),
    (lambda c: c.receipts(), "GET", "/receipts", None),
    (lambda c: c.families(), "GET", "/families", None),
    (lambda c: c.family("d"), "GET", "/families/d", None),
    (
        lambda c: c.set_floor(FAMILY, {3: 0.5}),
        "PUT",
        f"/families/{FAMILY.replace(':', '%3A')}/floor",
        {"floor": {"3": 0.5}},
    ),
    (lambda c: c.freeze_family("d"), "POST", "/families/d/freeze", {}),
    (lambda c: c.unfreeze_family("d"), "POST", "/families/d/unfreeze", {}),
    (lambda c: c.keys(), "GET", "/keys", None),
    (
        lambda c: c.add_key("app", scopes=("serve",), tenants=(NAME,), default_tenant=NAME),
        "POST",
        "/keys",
        {"name": "app", "scopes": ["serve"], "tenants": [NAME], "default_tenant": NAME},
    ),
    (lambda c: c.rotate_key("app"), "POST", "/keys/app/rotate", {}),
    (lambda c: c.rollouts(), "GET", "/rollouts", None),
    (lambda c: c.rollout(12), "GET", "/rollouts/12", None),
    (lambda c: c.jobs(), "GET", "/jobs", None),
    (lambda c: c.job(7), "GET", "/jobs/7", None),
    (lambda c: c.cancel_job(7), "POST", "/jobs/7/cancel", {}),
    (lambda c: c.replicas(), "GET", "/replicas", None),
    (lambda c: c.audit(), "GET", "/audit", None),
    (lambda c: c.usage(), "GET", "/usage", None),
]


@pytest.mark.parametrize(("call", "method", "path", "body"), CALLS)
def test_every_method_requests_its_route(
    client: Client, world: World, call: Call, method: str, path: str, body: Any
) -> None:
    assert call(client) is not None
    (request,) = world.requests
    assert (request.method, request.path, request.body) == (method, path, body)
    assert request.key == f"Bearer {KEY}" and request.query == {}


@pytest.mark.parametrize(("call", "method", "path", "body"), CALLS)
def test_every_method_of_the_async_client_calls_the_same_route(
    client: Client, world: World, call: Call, method: str, path: str, body: Any
) -> None:
    async def run() -> Any:
        async with AsyncClient(world.url, KEY, first_pause_s=0.01) as other:
            return await call(other)

    expected = call(client)
    world.job_states, world.applied = ["queued", "running", "done"], [1, 2]
    found = asyncio.run(run())
    first, second = world.requests
    assert (second.method, second.path, second.body) == (method, path, body)
    assert second == first
    assert type(found) is type(expected)


def test_every_method_is_tried_above() -> None:
    named = {name for call, *_ in CALLS for name in call.__code__.co_names}
    elsewhere = {"close", "revoke_key", "wait_job", "wait_rollout"}
    public = {name for name in vars(Client) if not name.startswith("_")}
    assert public <= named | elsewhere
    assert public == {name for name in vars(AsyncClient) if not name.startswith("_")}
    for name in public:
        assert getattr(Client, name).__doc__ == getattr(AsyncClient, name).__doc__


def test_filters_are_sent_in_the_query(client: Client, world: World) -> None:
    client.retire_tenant(NAME, expected_revision=2)
    client.audit(target=NAME, action="key.", limit=5, cursor=9)
    client.jobs(tenant=NAME, state="failed", limit=3)
    client.rollouts(limit=4)
    client.usage(tenant=NAME, key="app", since="2031-05-01", until="2031-05-31")
    first, second, third, fourth, fifth = (request.query for request in world.requests)
    days = {"since": "2031-05-01", "until": "2031-05-31"}
    assert fifth == {"tenant": NAME, "key": "app", **days}
    assert first == {"expected_revision": "2"}
    assert second == {"target": NAME, "action": "key.", "limit": "5", "cursor": "9"}
    assert third == {"tenant": NAME, "state": "failed", "limit": "3"} and fourth == {"limit": "4"}


def test_results_are_the_servers_objects(client: Client, world: World) -> None:
    tenant = client.tenant(NAME)
    dumped = tenant.model_dump(mode="json")
    assert dumped == world.tenants[NAME]
    assert tenant.created_at == datetime.fromisoformat(AT)
    assert client.add_key("app", scopes=["read"], tenants=["*"]).secret == SECRET
    assert [key.name for key in client.keys()] == ["app"]  # noqa: SIM118
    assert client.revoke_key("app").name == "app" and client.keys() == []


def test_fields_are_also_items(client: Client) -> None:
    tenant = client.tenant(NAME)
    assert tenant["name"] == tenant.name
    for missing in ("nom", "model_dump", "__class__"):
        with pytest.raises(KeyError):
            tenant[missing]


def test_fields_of_a_newer_server_are_preserved(client: Client, world: World) -> None:
    world.tenants[NAME]["region"] = "eu"
    found = client.tenant(NAME)
    (shown,) = as_dict([found])
    assert found["region"] == "eu" and shown == world.tenants[NAME]


@pytest.mark.parametrize("change", [{"published": "third"}, {"state": "paused"}, {"name": None}])
def test_an_object_of_another_form_is_an_error_that_names_the_field(
    client: Client, world: World, change: dict[str, Any]
) -> None:
    world.tenants[NAME] |= change
    for call in (lambda: client.tenant(NAME), client.tenants):
        with pytest.raises(
            ApiError, match=f"Tenant than expected: {next(iter(change))}: .*release"
        ):
            call()


def test_lists_are_read_page_after_page(client: Client, world: World) -> None:
    for number in range(4):
        world.tenant(f"t{number}")
    assert [tenant["name"] for tenant in client.tenants()] == [NAME, "t0", "t1", "t2", "t3"]
    assert [request.query.get("cursor") for request in world.requests] == [None, "2", "4"]


def test_a_list_that_leads_back_to_itself_ends(client: Client, world: World) -> None:
    page = {"data": [world.tenants[NAME]], "cursor": 5}
    world.errors += [JSONResponse(page), JSONResponse(page)]
    assert len(client.tenants()) == 2 and len(world.requests) == 2


# Addresses, names, keys


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1/safegene"),
        ("http://localhost:8000/v1/", "http://localhost:8000/v1/safegene"),
        ("https://h/llm/v1/safegene", "https://h/llm/v1/safegene"),
        (" https://[::1]:1 ", "https://[::1]:1/v1/safegene"),
    ],
)
def test_addresses(given: str, found: str) -> None:
    assert service_url(given) == found


@pytest.mark.parametrize(
    "given", ["", "localhost:8000", "ftp://h", "http://", "http://h:x", "http://h?a=1", "http://["]
)
def test_an_invalid_address_is_rejected(given: str) -> None:
    with pytest.raises(ConfigError, match="http://localhost:8000"):
        Client(given, KEY)


def test_no_password_in_an_address_and_none_in_a_message() -> None:
    with pytest.raises(ConfigError) as caught:
        Client("http://me:hunter2@h", KEY)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "..", ".", "../keys", "acme/..", "acme//support", "/acme"])
def test_a_name_never_leads_to_another_route(client: Client, world: World, name: str) -> None:
    for call in (client.tenant, client.freeze_tenant, client.retire_tenant):
        with pytest.raises(ConfigError, match="not a valid name"):
            call(name)
    assert world.requests == []


def test_odd_names_stay_in_their_place(client: Client, world: World) -> None:
    for name in ("a?b#c", "a b%2e", "ä"):
        with pytest.raises(ApiError):
            client.tenant(name)
    paths = [request.path for request in world.requests]
    assert paths == ["/tenants/a%3Fb%23c", "/tenants/a%20b%252e", "/tenants/%C3%A4"]


@pytest.mark.parametrize("key", ["", "two\nlines", "späce", "a b"])
def test_a_key_that_cannot_be_sent_is_rejected_and_not_shown(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Client("http://localhost:1", key)
    assert not key or key not in str(caught.value)


def test_a_key_is_not_shown() -> None:
    assert KEY not in repr(Client("http://localhost:1", KEY))


# Rejections


def test_a_rejection_has_the_servers_message(client: Client, world: World) -> None:
    world.errors.append(error(409, "revision 3 is published", param="expected_revision"))
    with pytest.raises(ApiError, match=r"^revision 3 is published \(HTTP 409\)$") as caught:
        client.change_profile(NAME, scale=2.0, expected_revision=2)
    found = caught.value
    assert (found.status, found.message) == (409, "revision 3 is published")
    assert found.param == "expected_revision"
    assert len(world.requests) == 1


@pytest.mark.parametrize(
    ("response", "words"),
    [
        (HTMLResponse("<h1>Bad gateway</h1>", 500), "Bad gateway"),
        (Response(status_code=418), "Teapot"),
        (JSONResponse({"detail": "no"}, 400), "no"),
        (JSONResponse(["x"], 400), "x"),
        (JSONResponse({"error": "flat"}, 400), "flat"),
        (JSONResponse({"detail": "Not Found"}, 404), "does this server run SafeGene"),
        (JSONResponse({"detail": "Method Not Allowed"}, 405), "and this release of it"),
        (RedirectResponse("https://elsewhere/v1"), "https://elsewhere/v1"),
        (JSONResponse(["not", "an", "object"]), "is this a SafeGene server"),
        (HTMLResponse("<h1>Hello</h1>"), "is this a SafeGene server"),
    ],
)
def test_any_other_response_is_reported_too(
    client: Client, world: World, response: Response, words: str
) -> None:
    world.errors.append(response)
    with pytest.raises(ApiError, match=words):
        client.tenant(NAME)


def test_an_invalid_list_is_reported(client: Client, world: World) -> None:
    world.errors.append(JSONResponse({"tenants": []}))
    with pytest.raises(ApiError, match="is this a SafeGene server"):
        client.tenants()


def test_a_wrong_key_is_rejected_with_advice(world: World) -> None:
    with Client(world.url, "sg-other") as client, pytest.raises(ApiError, match="still valid"):
        client.tenants()


def test_no_server() -> None:
    with Client("http://127.0.0.1:9", KEY) as client, pytest.raises(ApiError) as caught:
        client.tenants()
    assert caught.value.status is None and "127.0.0.1:9" in str(caught.value)


def test_a_number_that_json_lacks_is_not_sent(client: Client, world: World) -> None:
    with pytest.raises(ConfigError, match="finite"):
        client.change_profile(NAME, scale=float("nan"))
    assert world.requests == []


# Retries


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_retried_after_the_time_it_gives(
    client: Client, world: World, status: int
) -> None:
    world.errors += [error(status, "busy", Retry_After="0"), error(status, "busy", Retry_After="0")]
    assert client.rollback(NAME)["revision"]["number"] == 2
    assert len(world.requests) == 3 and len({request.path for request in world.requests}) == 1


def test_the_requested_pause_is_observed(client: Client, world: World) -> None:
    world.errors.append(error(429, "busy", Retry_After="1"))
    began = time.monotonic()
    client.freeze_tenant(NAME)
    assert 1.0 <= time.monotonic() - began < 20


def test_a_pause_may_be_a_date(client: Client, world: World) -> None:
    past = format_datetime(datetime.now(UTC) - timedelta(seconds=30), usegmt=True)
    world.errors.append(error(503, "busy", Retry_After=past))
    assert client.freeze_tenant(NAME)["state"] == "frozen"
    far = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    world.errors.append(error(503, "busy", Retry_After=far))
    with pytest.raises(ApiError) as caught:
        client.freeze_tenant(NAME)
    assert 3500 < (caught.value.retry_after_s or 0) <= 3600


@pytest.mark.parametrize("header", [{}, {"Retry_After": "soon"}])
def test_a_change_is_not_sent_twice_unless_the_server_requests_it(
    client: Client, world: World, header: dict[str, str]
) -> None:
    world.errors.append(error(503, "the engine is down", **header))
    with pytest.raises(ApiError, match="engine is down"):
        client.change_profile(NAME, scale=2.0)
    assert len(world.requests) == 1


@pytest.mark.parametrize("status", [502, 503, 504])
def test_reading_is_tried_again(client: Client, world: World, status: int) -> None:
    world.errors += [error(status, "away"), error(status, "away")]
    assert client.tenant(NAME)["name"] == NAME and len(world.requests) == 3


def test_retries_end(client: Client, world: World) -> None:
    world.errors += [error(429, "busy", Retry_After="0") for _ in range(9)]
    with pytest.raises(ApiError, match="busy"):
        client.freeze_tenant(NAME)
    assert len(world.requests) == 4


def test_too_long_a_pause_is_reported_and_not_waited_for(client: Client, world: World) -> None:
    world.errors.append(error(429, "busy", Retry_After=str(int(MAX_PAUSE_S) + 1)))
    began = time.monotonic()
    with pytest.raises(ApiError) as caught:
        client.tenant(NAME)
    assert caught.value.retry_after_s == MAX_PAUSE_S + 1 and time.monotonic() - began < 20


# Waiting


def test_a_job_is_watched_to_its_end(client: Client, world: World) -> None:
    looks: list[str] = []
    job = client.wait_job(7, poll_s=0.01, seen=lambda now: looks.append(now.state))
    assert job["state"] == "done" and looks == ["queued", "running", "done"]


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_a_job_that_fails_has_ended_too(client: Client, world: World, state: str) -> None:
    world.job_states = ["running", state]
    assert client.wait_job(7, poll_s=0.01)["state"] == state


def test_a_rollout_is_watched_to_its_end(client: Client, world: World) -> None:
    world.applied = [0, 1, 2]
    assert client.wait_rollout(12, poll_s=0.01)["applied"] == 2 and len(world.requests) == 3


@pytest.mark.parametrize("what", ["job", "rollout"])
def test_a_number_reused_for_another_is_not_waited_for(
    client: Client, world: World, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """As it may in a registry that was restored."""
    world.job_states, world.applied = ["running", "done"], [0, 2]
    look, looks = getattr(world, what), []

    def later() -> Any:
        looks.append(look())
        return looks[-1] | {"created_at": f"2031-05-0{len(looks)}T08:00:00+00:00"}

    monkeypatch.setattr(world, what, later)
    with pytest.raises(
        ApiError, match=f"{what} .* now stands for another one .*: the server's registry was"
    ):
        getattr(client, f"wait_{what}")(7 if what == "job" else 12, poll_s=0.01)
    assert len(looks) == 2


def test_waiting_has_an_end(client: Client, world: World) -> None:
    world.job_states, world.applied = ["running"], [1]
    with pytest.raises(TimeoutError, match="job 7"):
        client.wait_job(7, timeout_s=0.1, poll_s=0.02)
    with pytest.raises(TimeoutError, match="rollout 12"):
        client.wait_rollout(12, timeout_s=0.0)


def test_a_rejection_ends_the_waiting_and_an_outage_does_only_when_it_lasts(
    client: Client, world: World
) -> None:
    world.errors += [error(503, "starting") for _ in range(6)]
    assert client.wait_job(7, poll_s=0.01)["state"] == "done"
    world.errors.append(error(404, "no job 7"))
    with pytest.raises(ApiError, match="no job 7"):
        client.wait_job(7, poll_s=0.01)
    world.errors += [error(503, "starting") for _ in range(99)]
    with pytest.raises(ApiError, match="starting"):
        client.wait_job(7, poll_s=0.01, patience_s=0.1)


def test_a_job_is_watched_through_a_restart_of_the_server() -> None:
    world = World(job_states=["running"])
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    looked = threading.Event()
    ended: list[str] = []

    def watch() -> None:
        with Client(url, KEY, first_pause_s=0.01) as client:
            job = client.wait_job(7, poll_s=0.02, patience_s=30, seen=lambda now: looked.set())
            ended.append(job["state"])

    thread = threading.Thread(target=watch)
    thread.start()
    with served(app_of(world), port):
        assert looked.wait(300)
    world.job_states = ["done"]
    with served(app_of(world), port):
        thread.join(300)
    assert ended == ["done"]


def test_an_async_client_waits_without_blocking_the_loop(world: World) -> None:
    states: list[str] = []

    async def run() -> None:
        world.errors.append(error(503, "starting", Retry_After="0"))
        async with AsyncClient(world.url, KEY, first_pause_s=0.01) as client:
            ticks = asyncio.create_task(asyncio.sleep(0))
            job = await client.wait_job(7, poll_s=0.01, seen=lambda now: states.append(now.state))
            assert ticks.done() and job.state == "done"
            world.applied = [0, 1, 2]
            assert (await client.wait_rollout(12, poll_s=0.01)).applied == 2
            with pytest.raises(ApiError, match="not a route"):
                await client.rollout(13)

    asyncio.run(run())
    assert states == ["queued", "running", "done"]


def test_an_async_client_reports_a_server_that_does_not_respond() -> None:
    async def run() -> None:
        async with AsyncClient("http://127.0.0.1:9", KEY) as client:
            await client.tenants()

    with pytest.raises(ApiError, match=r"127\.0\.0\.1:9.* does not respond") as caught:
        asyncio.run(run())
    assert caught.value.status is None
