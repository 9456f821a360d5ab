"""Jobs: one owner at a time, also when owners die, and a limited number of attempts."""

from __future__ import annotations

import threading
import time

import pytest
from registry_setup import FAMILY, add_ready, header, registry, start_python, url

from safegene_server.registry import Registry
from safegene_server.registry.jobs import MAX_ATTEMPTS, PRIVATE
from safegene_vllm.errors import ConflictError, NotFoundError, RegistryError

__all__ = ["registry", "url"]

TENANT = "acme/support"
CLAIM_ALL = """
import sys
from safegene_server.registry import Registry
registry, owner = Registry(sys.argv[1], migrate=False), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
claimed = []
while (job := registry.jobs.claim(owner, actor=owner)) is not None:
    claimed.append(job.id)
print(*claimed, flush=True)
"""


CLAIM_AND_HANG = """
import sys
from safegene_server.registry import Registry
registry, owner = Registry(sys.argv[1], migrate=False), sys.argv[2]
job = registry.jobs.claim(owner, actor=owner, lease_s=0.2)
print("nothing" if job is None else f"job {job.id}", flush=True)
sys.stdin.readline()
"""


def add(registry: Registry, count: int = 1) -> list[int]:
    return [registry.jobs.enqueue("calibrate", TENANT, actor="me").id for _ in range(count)]


def test_the_life_cycle_of_a_job(registry: Registry) -> None:
    revision = add_ready(registry, TENANT)
    job = registry.jobs.enqueue(
        "gate", TENANT, actor="me", revision=revision.id, params={"rows": [1, 2.5]}
    )
    assert (job.kind, job.tenant, job.revision) == ("gate", TENANT, revision.id)
    assert (job.params, job.state, job.attempts) == ({"rows": [1, 2.5]}, "queued", 0)
    claimed = registry.jobs.claim("worker", actor="worker")
    assert claimed is not None and claimed.id == job.id
    assert (claimed.state, claimed.owner, claimed.attempts) == ("running", "worker", 1)
    assert claimed.lease_until is not None and claimed.lease_until > claimed.updated_at
    moved = registry.jobs.progress(job.id, "worker", 0.5, "half", actor="worker")
    assert (moved.progress, moved.message, moved.cancel_requested) == (0.5, "half", False)
    ended = registry.jobs.finish(
        job.id, "worker", "done", actor="worker", message="nul\x00", result={"loss": 0.1}
    )
    assert (ended.state, ended.progress, ended.result) == ("done", 1.0, {"loss": 0.1})
    assert (ended.message, ended.lease_until) == ("nul?", None)
    assert registry.jobs.claim("worker", actor="worker") is None
    assert registry.jobs.list(tenant=TENANT, state="done") == (registry.jobs.get(job.id),)
    assert registry.jobs.list(state="queued") == registry.jobs.list(tenant="globex") == ()


def test_private_parameters_are_deleted_however_a_job_ends(registry: Registry) -> None:
    given = {"seed": 1, PRIVATE: {"rows": ["secret"]}}
    done, waiting, begun = (
        registry.jobs.enqueue("calibrate", TENANT, actor="me", params=given).id for _ in range(3)
    )
    claimed = registry.jobs.claim("worker", actor="worker")
    assert claimed is not None and claimed.params == given
    assert registry.jobs.progress(done, "worker", 0.5, actor="worker").params == given
    assert registry.jobs.finish(done, "worker", "failed", actor="worker").params == {"seed": 1}
    assert registry.jobs.cancel(waiting, actor="me").params == {"seed": 1}
    for _ in range(MAX_ATTEMPTS):
        again = registry.jobs.claim("worker", actor="worker", lease_s=-1.0)
        assert again is not None and again.params == given
    assert registry.jobs.claim("worker", actor="worker") is None
    assert (registry.jobs.get(begun).state, registry.jobs.get(begun).params) == (
        "failed",
        {"seed": 1},
    )
    assert "secret" not in str(registry.audit.page(limit=1000))


def test_the_oldest_job_of_the_given_kinds_is_claimed_first(registry: Registry) -> None:
    for kind in ("gate", "calibrate", "gate"):
        registry.jobs.enqueue(kind, TENANT, actor="me")
    order = []
    while (job := registry.jobs.claim("w", actor="w", kinds=["calibrate", "other"])) is not None:
        order.append(job.id)
    while (job := registry.jobs.claim("w", actor="w")) is not None:
        order.append(job.id)
    assert order == [2, 1, 3]


def test_many_threads_claim_every_job_once(registry: Registry) -> None:
    ids = add(registry, 24)
    claimed: list[int] = []
    failed: list[BaseException] = []

    def work(owner: str) -> None:
        try:
            while (job := registry.jobs.claim(owner, actor=owner)) is not None:
                claimed.append(job.id)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(f"w{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failed == []
    assert sorted(claimed) == ids


def test_processes_claim_every_job_once(registry: Registry) -> None:
    ids = add(registry, 40)
    address = registry.database.url.render_as_string(hide_password=False)
    workers = [start_python(CLAIM_ALL, address, f"w{n}") for n in range(2)]
    for worker in workers:
        assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
    claimed = []
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    for worker in workers:
        out, _ = worker.communicate(timeout=300)
        assert worker.returncode == 0
        claimed += [int(word) for word in out.split()]
    assert sorted(claimed) == ids
    assert len(registry.audit.page(action="job.claim").entries) == 40


def test_a_job_with_an_expired_lease_is_claimed_again(registry: Registry) -> None:
    [job] = add(registry)
    registry.jobs.claim("dead", actor="dead")
    assert registry.jobs.claim("heir", actor="heir") is None
    registry.jobs.progress(job, "dead", 0.0, actor="dead", lease_s=-1.0)
    taken = registry.jobs.claim("heir", actor="heir")
    assert taken is not None and (taken.id, taken.owner, taken.attempts) == (job, "heir", 2)
    for late in (
        lambda: registry.jobs.progress(job, "dead", 0.9, actor="dead"),
        lambda: registry.jobs.finish(job, "dead", "done", actor="dead"),
    ):
        with pytest.raises(ConflictError, match="is running by 'heir', not held by 'dead'; stop"):
            late()
    assert registry.jobs.get(job) == taken


def test_progress_renews_the_lease(registry: Registry) -> None:
    [job] = add(registry)
    registry.jobs.claim("w", actor="w", lease_s=0.3)
    registry.jobs.progress(job, "w", 0.1, actor="w", lease_s=30.0)
    time.sleep(0.35)
    assert registry.jobs.claim("heir", actor="heir") is None


def test_a_job_whose_server_died_is_retried_once_and_then_fails(
    registry: Registry,
) -> None:
    """By processes that are killed while they hold it, as a server that hangs is in the end."""
    [job] = add(registry)
    address = registry.database.url.render_as_string(hide_password=False)
    heard = []
    for owner in ("first", "second", "third", "fourth"):
        victim = start_python(CLAIM_AND_HANG, address, owner)
        assert victim.stdout is not None
        heard.append(victim.stdout.readline().strip())
        victim.kill()
        victim.communicate(timeout=300)
        time.sleep(0.3)
    assert heard == [f"job {job}", f"job {job}", "nothing", "nothing"]
    ended = registry.jobs.get(job)
    assert (ended.state, ended.attempts, ended.owner) == ("failed", 2, "second")
    assert "started 2 times, and each time its server died" in ended.message
    assert "the log of the last one, second, then" in ended.message
    assert f"`safegene tenant update {TENANT}`" in ended.message
    [after] = add(registry)
    following = registry.jobs.claim("w", actor="w")
    assert following is not None and following.id == after


def test_a_released_job_does_not_count_an_attempt(registry: Registry) -> None:
    given = {"seed": 1, PRIVATE: {"rows": ["secret"]}}
    job = registry.jobs.enqueue("calibrate", TENANT, actor="me", params=given).id
    for number in range(2 * MAX_ATTEMPTS):
        claimed = registry.jobs.claim(f"w{number}", actor="w")
        assert claimed is not None and (claimed.id, claimed.attempts) == (job, 1)
        released = registry.jobs.release(job, f"w{number}", actor="w")
        assert (released.state, released.owner, released.lease_until) == ("queued", None, None)
        assert (released.attempts, released.params) == (0, given)
    assert len(registry.audit.page(action="job.release").entries) == 2 * MAX_ATTEMPTS
    with pytest.raises(ConflictError, match="is queued, not held by 'w0'"):
        registry.jobs.release(job, "w0", actor="w")
    registry.jobs.claim("w", actor="w")
    with pytest.raises(ConflictError, match="is running by 'w', not held by 'w0'"):
        registry.jobs.release(job, "w0", actor="w")


def test_a_release_does_not_reset_earlier_attempts(registry: Registry) -> None:
    [job] = add(registry)
    registry.jobs.claim("dead", actor="w", lease_s=-1.0)
    for owner in ("stops", "stops too"):
        claimed = registry.jobs.claim(owner, actor="w")
        assert claimed is not None and claimed.attempts == 2
        assert registry.jobs.release(job, owner, actor="w").attempts == 1
    registry.jobs.claim("dies", actor="w", lease_s=-1.0)
    assert registry.jobs.claim("w", actor="w") is None
    assert registry.jobs.get(job).state == "failed"


def test_a_released_job_with_a_requested_cancellation_is_not_started_again(
    registry: Registry,
) -> None:
    [job] = add(registry)
    registry.jobs.claim("w", actor="w")
    registry.jobs.cancel(job, actor="me")
    registry.jobs.release(job, "w", actor="w")
    assert registry.jobs.claim("w", actor="w") is None
    assert registry.jobs.get(job).state == "cancelled"


def test_cancelling(registry: Registry) -> None:
    waiting, running, orphan = add(registry, 3)
    assert registry.jobs.cancel(waiting, actor="me").state == "cancelled"
    first = registry.jobs.claim("w", actor="w")
    assert first is not None and first.id == running
    assert registry.jobs.cancel(running, actor="me").state == "running"
    assert registry.jobs.progress(running, "w", 0.2, actor="w").cancel_requested
    assert registry.jobs.finish(running, "w", "cancelled", actor="w").state == "cancelled"
    second = registry.jobs.claim("dead", actor="dead", lease_s=0.05)
    assert second is not None and second.id == orphan
    registry.jobs.cancel(orphan, actor="me")
    time.sleep(0.1)
    assert registry.jobs.claim("w", actor="w") is None
    assert registry.jobs.get(orphan).state == "cancelled"
    with pytest.raises(ConflictError, match="is cancelled; there is nothing to cancel"):
        registry.jobs.cancel(orphan, actor="me")


def test_invalid_jobs_are_rejected(registry: Registry) -> None:
    revision = add_ready(registry, TENANT)
    registry.tenants.add("globex", revision.profile.family, actor="me")
    with pytest.raises(NotFoundError, match="acme/support@1 is not a revision of tenant 'globex'"):
        registry.jobs.enqueue("gate", "globex", actor="me", revision=revision.id)
    with pytest.raises(NotFoundError):
        registry.jobs.enqueue("gate", "initech", actor="me")
    with pytest.raises(RegistryError, match="params is not plain JSON"):
        registry.jobs.enqueue("gate", TENANT, actor="me", params={"x": object()})
    [job] = add(registry)
    registry.jobs.claim("w", actor="w")
    for progress in (-0.1, 1.1, float("nan")):
        with pytest.raises(RegistryError, match="from 0 to 1"):
            registry.jobs.progress(job, "w", progress, actor="w")
    with pytest.raises(RegistryError, match="expected done, failed or cancelled"):
        registry.jobs.finish(job, "w", "queued", actor="w")  # type: ignore[arg-type]


def test_jobs_are_claimed_by_family(registry: Registry) -> None:
    (job,) = add(registry)
    other = header("other", "1")
    assert registry.jobs.claim("a", actor="a", family=other.digest) is None
    claimed = registry.jobs.claim("a", actor="a", family=FAMILY)
    assert claimed is not None and claimed.id == job
