"""Jobs in a process: lease renewal, one end, and release when the process stops."""

from __future__ import annotations

import asyncio
import contextlib
import time
from datetime import UTC, datetime
from typing import Any

import pytest
from registry_setup import back_up
from tenant_setup import World, world

from safegene_server.error_responses import EngineDownError
from safegene_server.registry import Job
from safegene_server.tenants import Jobs, TenantContext, TenantSettings, Work
from safegene_vllm.errors import AdapterRejectedError, RegistryDownError

__all__ = ["world"]

TENANT = "acme/support"


def jobs_of(world: World, handler: Any, **settings: Any) -> Jobs:
    """Jobs of the world's server, of one kind."""
    given = TenantSettings(**{"poll_s": 0.02, **settings})
    tenancy = TenantContext(world.replica, world.registry, world.store, given)
    return Jobs(tenancy, {"test": handler})


@pytest.fixture(autouse=True)
def tenant(world: World) -> None:
    world.registry.tenants.add(TENANT, world.replica.header.digest, actor="test")


def enqueue(world: World, kind: str = "test") -> int:
    return world.registry.jobs.enqueue(kind, TENANT, actor="test").id


def run_one(world: World, handler: Any, **settings: Any) -> Job:
    number = enqueue(world)
    jobs = jobs_of(world, handler, **settings)
    assert asyncio.run(jobs.run_one())
    return world.registry.jobs.get(number)


def test_a_job_that_is_done(world: World) -> None:
    async def handler(_: TenantContext, work: Work) -> str:
        await work.step(0.5, "half")
        assert world.registry.jobs.get(work.job.id).progress == 0.5
        work.result["found"] = 3
        return "well done"

    job = run_one(world, handler)
    assert (job.state, job.message, job.result) == ("done", "well done", {"found": 3})
    assert job.progress == 1.0


def test_a_job_that_fails_says_why_and_retains_its_results(world: World) -> None:
    async def handler(_: TenantContext, work: Work) -> str:
        work.result["revision"] = "acme@1"
        raise AdapterRejectedError("no good")

    job = run_one(world, handler)
    assert (job.state, job.message, job.result) == ("failed", "no good", {"revision": "acme@1"})


def test_an_unexpected_failure_shows_nothing_of_itself(world: World) -> None:
    async def handler(_: TenantContext, work: Work) -> str:
        raise RuntimeError("a secret")

    job = run_one(world, handler)
    assert job.state == "failed" and "secret" not in job.message


@pytest.mark.parametrize("error", [RegistryDownError("down"), EngineDownError("dead")])
def test_an_error_outside_the_job_leaves_it_to_its_lease(world: World, error: Exception) -> None:
    async def handler(_: TenantContext, work: Work) -> str:
        raise error

    async def better(_: TenantContext, work: Work) -> str:
        return f"attempt {work.job.attempts}"

    job = run_one(world, handler, lease_s=0.1)
    assert job.state == "running"
    time.sleep(0.15)
    jobs = jobs_of(world, better)
    assert asyncio.run(jobs.run_one())
    assert world.registry.jobs.get(job.id).message == "attempt 2"


def test_only_jobs_with_a_handler_here_are_claimed(world: World) -> None:
    number = enqueue(world, "unknown")

    async def handler(_: TenantContext, work: Work) -> str:
        raise AssertionError

    jobs = jobs_of(world, handler)
    assert not asyncio.run(jobs.run_one())
    assert world.registry.jobs.get(number).state == "queued"


def test_a_cancel_is_heard_between_steps_and_by_threads(world: World) -> None:
    async def handler(_: TenantContext, work: Work) -> str:
        world.registry.jobs.cancel(work.job.id, actor="test")
        assert await asyncio.to_thread(work.cancelled.wait, 5)
        await work.step(0.5, "too late")
        raise AssertionError

    job = run_one(world, handler, lease_s=0.4)
    assert (job.state, job.message) == ("cancelled", "the job was cancelled")


def test_a_long_job_renews_its_lease(world: World) -> None:
    async def handler(_: TenantContext, work: Work) -> str:
        first = work.job.lease_until
        assert first is not None
        while datetime.now(UTC) < first:
            await asyncio.sleep(0.02)
        assert world.registry.jobs.claim("thief", actor="thief") is None
        return "renewed"

    assert run_one(world, handler, lease_s=2.0).message == "renewed"


def test_a_job_that_another_holds_is_stopped_here(world: World) -> None:
    stopped = []

    async def handler(_: TenantContext, work: Work) -> str:
        with world.registry.database.write("test") as write:
            write.connection.exec_driver_sql("UPDATE jobs SET owner = 'thief'")
            write.skip_audit()
        try:
            await asyncio.sleep(30)
        finally:
            stopped.append(work.cancelled.is_set())
        return "never"

    job = run_one(world, handler, lease_s=0.2)
    assert (job.state, job.owner) == ("running", "thief")
    assert stopped == [True]


@pytest.mark.parametrize("after", ["forgotten", "waiting", "another"])
def test_a_job_of_a_registry_that_was_restored_is_stopped_here(world: World, after: str) -> None:
    """It may be unknown then, wait again, or its id is another job's, which may run here as well;
    what it was speaks for none of them."""
    restore = back_up(world.registry)
    number = enqueue(world, "first")
    if after == "waiting":
        restore = back_up(world.registry)
    begun, ended, claimed = asyncio.Event(), [], []

    async def first(_: TenantContext, work: Work) -> str:
        begun.set()
        try:
            await asyncio.sleep(30)
        finally:
            ended.append(work.cancelled.is_set())
        return "never"

    async def second(_: TenantContext, work: Work) -> str:
        claimed.append(work.job.id)
        while not ended:
            await asyncio.sleep(0.01)
        return "of the job that is there now"

    jobs = jobs_of(world, first, lease_s=1.0)
    jobs.handlers = {"first": first, "second": second}

    async def run() -> None:
        running = asyncio.create_task(jobs.run_one())
        await asyncio.wait_for(begun.wait(), 300)
        restore()
        if after == "another":
            assert enqueue(world, "second") == number
        jobs.handlers["first"] = second
        if after != "forgotten":
            assert await jobs.run_one()
        assert await asyncio.wait_for(running, 300)

    asyncio.run(run())
    assert ended == [True]
    if after == "forgotten":
        assert world.registry.jobs.list() == ()
    else:
        (job,) = world.registry.jobs.list()
        assert (job.state, job.message) == ("done", "of the job that is there now")
        assert claimed == [number] and job.attempts == 1


def test_several_run_at_once_until_the_server_stops(world: World) -> None:
    numbers = [enqueue(world) for _ in range(3)]
    together: list[int] = []

    async def handler(_: TenantContext, work: Work) -> str:
        together.append(work.job.id)
        await asyncio.sleep(0.1 if work.job.id != numbers[2] else 30)
        return "done"

    jobs = jobs_of(world, handler, jobs_at_once=2, lease_s=5.0)

    async def serve() -> None:
        running = asyncio.create_task(jobs.run())
        async with asyncio.timeout(300):
            while len(together) < 3:
                await asyncio.sleep(0.01)
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running

    asyncio.run(serve())
    states = [world.registry.jobs.get(number).state for number in numbers]
    assert sorted(together) == numbers
    # The last one was under way when the server stopped; it waits for the next one.
    assert states[2] == "queued" and states.count("done") >= 1


def stop_in_the_middle(jobs: Jobs, begun: asyncio.Event) -> None:
    """Run jobs until one has begun, then stop as a server does on SIGTERM."""

    async def serve() -> None:
        running = asyncio.create_task(jobs.run())
        async with asyncio.timeout(300):
            await begun.wait()
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running

    asyncio.run(serve())


def test_a_server_that_stops_leaves_its_job_to_the_next_at_no_cost(world: World) -> None:
    number = enqueue(world)
    for _ in range(4):
        begun = asyncio.Event()

        async def handler(_: TenantContext, work: Work, begun: asyncio.Event = begun) -> str:
            begun.set()
            await asyncio.sleep(30)
            return "never"

        stop_in_the_middle(jobs_of(world, handler, lease_s=30.0), begun)
        job = world.registry.jobs.get(number)
        assert (job.state, job.attempts, job.owner) == ("queued", 0, None)

    async def better(_: TenantContext, work: Work) -> str:
        return "resumed"

    jobs = jobs_of(world, better)
    assert asyncio.run(jobs.run_one()), "it need not wait for a lease"
    assert world.registry.jobs.get(number).message == "resumed"


def test_a_job_that_is_claimed_while_the_server_stops_is_released(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = enqueue(world)
    claim, begun = world.registry.jobs.claim, asyncio.Event()

    async def handler(_: TenantContext, work: Work) -> str:
        raise AssertionError

    jobs = jobs_of(world, handler, jobs_at_once=1)

    async def serve() -> None:
        loop = asyncio.get_running_loop()

        def slow(*args: Any, **more: Any) -> Job | None:
            loop.call_soon_threadsafe(begun.set)
            time.sleep(0.2)
            return claim(*args, **more)

        monkeypatch.setattr(world.registry.jobs, "claim", slow)
        running = asyncio.create_task(jobs.run())
        await begun.wait()
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running

    asyncio.run(serve())
    released = world.registry.jobs.get(number)
    assert (released.state, released.attempts) == ("queued", 0)


def test_a_server_that_stops_without_a_registry_leaves_its_job_to_the_lease(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    number, begun = enqueue(world), asyncio.Event()

    async def handler(_: TenantContext, work: Work) -> str:
        begun.set()
        await asyncio.sleep(30)
        return "never"

    def down(*_: Any, **__: Any) -> Job:
        raise RegistryDownError("away")

    monkeypatch.setattr(world.registry.jobs, "release", down)
    stop_in_the_middle(jobs_of(world, handler), begun)
    assert world.registry.jobs.get(number).state == "running"


def test_a_new_job_need_not_wait_for_the_poll(world: World) -> None:
    done = asyncio.Event()

    async def handler(_: TenantContext, work: Work) -> str:
        done.set()
        return "done"

    jobs = jobs_of(world, handler, poll_s=3600.0)

    async def serve() -> float:
        running = asyncio.create_task(jobs.run())
        await asyncio.sleep(0.2)
        await asyncio.to_thread(enqueue, world)
        began_s = time.monotonic()
        jobs.tenancy.job_added.set()
        async with asyncio.timeout(300):
            await done.wait()
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        return time.monotonic() - began_s

    assert asyncio.run(serve()) < 600


def test_an_unreachable_registry_is_queried_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = enqueue(world)
    claim, calls = world.registry.jobs.claim, []

    def flaky(*args: Any, **more: Any) -> Job | None:
        calls.append(1)
        if len(calls) < 3:
            raise RegistryDownError("away")
        return claim(*args, **more)

    monkeypatch.setattr(world.registry.jobs, "claim", flaky)

    async def handler(_: TenantContext, work: Work) -> str:
        return "done"

    jobs = jobs_of(world, handler, jobs_at_once=1)

    async def serve() -> None:
        running = asyncio.create_task(jobs.run())
        async with asyncio.timeout(300):
            while (await asyncio.to_thread(world.registry.jobs.get, number)).state != "done":
                await asyncio.sleep(0.01)
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running

    asyncio.run(serve())
    assert len(calls) >= 3
