"""Several processes on one registry: unique numbers, no lost update, atomic writes."""

from __future__ import annotations

import random
import subprocess
import time
from collections import Counter

import pytest
from registry_setup import (
    FAMILY,
    add_published,
    add_ready,
    postgres,
    profile,
    registry,
    start_python,
    url,
    wait_for_line,
)

from safegene_server.registry import Registry
from safegene_vllm.errors import ConflictError

__all__ = ["registry", "url"]

TENANT = "acme/support"
BEGIN = """
import sys
from registry_setup import FAMILY, add_ready, profile
from safegene_server.registry import Registry
from safegene_vllm.errors import ConflictError
registry, me = Registry(sys.argv[1], migrate=False), sys.argv[2]
TENANT = "acme/support"
print("ready", flush=True)
sys.stdin.readline()
"""
ADD_MANY = (
    BEGIN
    + """
for _ in range(25):
    print(registry.revisions.add(TENANT, profile(), actor=me).number)
"""
)
SWITCH_MANY = (
    BEGIN
    + """
won = 0
while won < 10:
    seen = registry.tenants.get(TENANT).published
    try:
        registry.rollouts.publish(TENANT, 3 - seen, actor=me, expected=seen)
    except ConflictError:
        continue
    won += 1
    print(seen, 3 - seen)
"""
)
STOP_BEFORE_THE_END = (
    BEGIN
    + """
import time
from safegene_server.registry.database import Write
audit = Write.audit
def hang(write, *args, **details):
    audit(write, *args, **details)
    if args[0] == sys.argv[3]:
        print("inside", flush=True)
        time.sleep(60)
Write.audit = hang
{
    "tenant.publish": lambda: registry.rollouts.publish(TENANT, 2, actor=me),
    "tenant.rollback": lambda: registry.rollouts.rollback(TENANT, actor=me),
    "tenant.floor": lambda: registry.policies.set_floor(FAMILY, {0: 2}, actor=me),
    "revision.add": lambda: registry.revisions.add(TENANT, profile(), actor=me),
    "key.rotate": lambda: registry.keys.rotate("ci", actor=me),
    "job.claim": lambda: registry.jobs.claim(me, actor=me),
}[sys.argv[3]]()
"""
)
WRITE_ON = (
    BEGIN
    + """
while True:
    added = add_ready(registry, TENANT)
    registry.rollouts.publish(TENANT, added.number, actor=me)
    registry.rollouts.rollback(TENANT, actor=me)
"""
)


def start(registry: Registry, code: str, *arguments: str) -> subprocess.Popen[str]:
    address = registry.database.url.render_as_string(hide_password=False)
    return start_python(code, address, *arguments)


def release(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        wait_for_line(process, "ready")
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()


def output(process: subprocess.Popen[str]) -> list[list[int]]:
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return [[int(word) for word in line.split()] for line in out.splitlines()]


def backends(registry: Registry) -> set[int]:
    """The processes that serve the database's clients; none for a SQLite file."""
    if not registry.database.is_postgresql:
        return set()
    rows = postgres().execute(
        "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend'"
        f" AND datname = '{registry.database.url.database}'"
    )
    return {row[0] for row in rows}


def check_whole(registry: Registry) -> None:
    """Check what holds after every committed write, whichever process died."""
    revisions = registry.revisions.list(TENANT)
    numbers = [revision.number for revision in revisions]
    assert numbers == list(range(1, len(numbers) + 1))
    published = [revision.number for revision in revisions if revision.state == "published"]
    assert published == [registry.tenants.get(TENANT).published]
    entries, cursor = [], None
    while True:
        page = registry.audit.page(limit=1000, cursor=cursor)
        entries += page.entries
        cursor = page.cursor
        if cursor is None:
            break
    actions = Counter(entry.action for entry in entries)
    assert actions["revision.add"] == len(revisions)
    versions = [e.details["version"] for e in entries if "version" in e.details]
    assert sorted(set(versions)) == list(range(1, registry.version() + 1))
    rollouts = registry.rollouts.list(limit=10_000)
    assert len(rollouts) == actions["tenant.publish"] + actions["tenant.rollback"]
    assert len({rollout.version for rollout in rollouts}) == len(rollouts)


def test_two_processes_never_assign_the_same_number(registry: Registry) -> None:
    processes = [start(registry, ADD_MANY, f"p{n}") for n in range(2)]
    release(*processes)
    numbers = [number for process in processes for [number] in output(process)]
    assert sorted(numbers) == list(range(1, 51))
    assert [revision.number for revision in registry.revisions.list(TENANT)] == sorted(numbers)


def test_two_processes_never_lose_a_publication(registry: Registry) -> None:
    add_published(registry, TENANT)
    add_ready(registry, TENANT)
    processes = [start(registry, SWITCH_MANY, f"p{n}") for n in range(2)]
    release(*processes)
    won = [tuple(pair) for process in processes for pair in output(process)]
    switches = registry.audit.page(action="tenant.publish", limit=1000).entries[:-1]
    made = [(e.details["before"], int(e.target.partition("@")[2])) for e in reversed(switches)]
    # One chain: every switch began where the one before it ended.
    assert len(made) == 20 and Counter(made) == Counter(won)
    assert made == [(1, 2), (2, 1)] * 10
    assert {entry.actor for entry in switches} == {"p0", "p1"}
    check_whole(registry)


@pytest.mark.parametrize(
    "action",
    [
        "tenant.publish",
        "tenant.rollback",
        "tenant.floor",
        "revision.add",
        "key.rotate",
        "job.claim",
    ],
)
def test_a_write_of_a_killed_process_is_rolled_back(registry: Registry, action: str) -> None:
    add_published(registry, TENANT)
    add_ready(registry, TENANT)
    add_published(registry, TENANT)
    registry.keys.add("ci", scopes=["read"], tenants=[TENANT], actor="me")
    job = registry.jobs.enqueue("gate", TENANT, actor="me")
    before = (
        registry.snapshot(),
        registry.revisions.list(TENANT),
        registry.audit.page(),
        registry.keys.list(),
    )
    victim = start(registry, STOP_BEFORE_THE_END, "victim", action)
    release(victim)
    wait_for_line(victim, "inside")
    victim.kill()
    victim.communicate(timeout=300)
    after = (
        registry.snapshot(),
        registry.revisions.list(TENANT),
        registry.audit.page(),
        registry.keys.list(),
    )
    assert after == before
    assert registry.jobs.get(job.id) == job
    # The next writer does not wait for the dead one.
    began = time.monotonic()
    registry.rollouts.publish(TENANT, 2, actor="me", expected=3)
    while (claimed := registry.jobs.claim("heir", actor="heir")) is None:
        assert time.monotonic() - began < 60
        time.sleep(0.02)
    assert claimed.attempts == 1
    assert time.monotonic() - began < 60
    check_whole(registry)


def test_a_writer_killed_at_any_time_leaves_a_consistent_registry(registry: Registry) -> None:
    add_published(registry, TENANT)
    chance, ours = random.Random(4), backends(registry)
    for round_number in range(2):
        writers = [start(registry, WRITE_ON, f"w{round_number}-{n}") for n in range(2)]
        busy = registry.version() + 5
        release(*writers)
        while registry.version() < busy:
            time.sleep(0.01)
        time.sleep(chance.random() / 2)
        for writer in writers:
            writer.kill()
        for writer in writers:
            writer.communicate(timeout=300)
        # A commit that was sent may still be under way.
        deadline = time.monotonic() + 300
        while not backends(registry) <= ours:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        check_whole(registry)
    assert registry.version() > 10
    survivor = add_published(registry, TENANT)
    assert registry.tenants.get(TENANT).published == survivor.number
    check_whole(registry)


def test_the_consistency_check_detects_a_gap(registry: Registry) -> None:
    add_published(registry, TENANT)
    check_whole(registry)
    with registry.database.write("intruder") as write:
        write.bump()
        write.skip_audit()
    with pytest.raises(AssertionError):
        check_whole(registry)


def test_threads_share_one_registry(registry: Registry) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        numbers = list(
            pool.map(
                lambda n: registry.revisions.add(TENANT, profile(), actor=f"t{n}").number, range(40)
            )
        )
    assert sorted(numbers) == list(range(1, 41))
    add_ready(registry, TENANT)

    def publish(n: int) -> bool:
        try:
            registry.rollouts.publish(TENANT, 41, actor=f"t{n}", expected=0)
        except ConflictError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(publish, range(8))) == 1
    assert registry.policies.get(FAMILY).floor == {}
