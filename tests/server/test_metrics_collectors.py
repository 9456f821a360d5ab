"""Gauges of the registry and of a replica that follows it: counts, lag, and a registry that is
down or does not response. The registry is real.
"""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field
from typing import Any

import pytest
from metrics_setup import clean, growth, values  # noqa: F401
from registry_setup import FAMILY, add_published, profile, registry, url  # noqa: F401

from safegene_server.metrics.labels import TenantLabels
from safegene_server.monitoring import collectors
from safegene_server.monitoring.collectors import RegistryCollector
from safegene_server.registry import Registry
from safegene_server.replica.lag import Lag
from safegene_vllm.errors import RegistryDownError

pytestmark = pytest.mark.usefixtures("clean")


@dataclass
class Follower:
    version: int = 3
    lag: Lag = field(default_factory=Lag)
    why: tuple[str, ...] = ()
    names: list[str] = field(default_factory=list)

    def problems(self) -> tuple[str, ...]:
        return self.why

    def served(self) -> list[tuple[str, Any]]:
        return [(name, None) for name in self.names]


def gauges(name: str) -> dict[str, float]:
    found = values(f"safegene_{name}")
    return {
        ",".join(value for _, value in labels): value
        for (full, labels), value in found.items()
        if full == f"safegene_{name}"
    }


def test_how_far_a_replica_is() -> None:
    now_s = [100.0]
    follower = Follower(lag=Lag(clock=lambda: now_s[0]), why=("a: no", "b: no"))
    collector = RegistryCollector(TenantLabels(), None, follower)  # type: ignore[arg-type]
    follower.lag.observe(4)
    now_s[0] = 107.5
    asyncio.run(collector.export_lag())
    assert gauges("registry_version") == {"known": 4, "applied": 3}
    assert gauges("registry_lag_seconds") == {"": 7.5}
    assert gauges("replica_ready") == {"": 0}
    assert gauges("replica_faults") == {"": 2}
    follower.why, follower.version = (), 4
    follower.lag.apply(4)
    asyncio.run(collector.export_lag())
    assert gauges("registry_lag_seconds") == {"": 0}
    assert gauges("replica_ready") == {"": 1}


def test_the_lag_is_that_of_the_oldest_version_not_served() -> None:
    now_s = [0.0]
    lag = Lag(clock=lambda: now_s[0])
    assert (lag.known, lag.seconds()) == (0, 0.0)
    for version, at in ((5, 1.0), (5, 2.0), (4, 3.0), (6, 4.0)):
        now_s[0] = at
        lag.observe(version)
    now_s[0] = 10.0
    assert (lag.known, lag.seconds()) == (6, 9.0)
    lag.apply(5)
    assert lag.seconds() == 6.0
    lag.apply(6)
    assert lag.seconds() == 0.0


def test_the_lag_begins_again_with_a_registry_that_was_restored() -> None:
    now_s = [0.0]
    lag = Lag(clock=lambda: now_s[0])
    lag.observe(24)
    now_s[0] = 5.0
    lag.observe(12, 1)
    # A thread may still report what it read before.
    lag.observe(25)
    lag.apply(24)
    now_s[0] = 7.0
    assert (lag.known, lag.seconds(), lag.heard_s(12)) == (12, 2.0, 5.0)
    lag.apply(12, 1)
    assert (lag.known, lag.seconds()) == (12, 0.0)
    lag.observe(13, 1)
    assert (lag.known, lag.heard_s(13)) == (13, 7.0)


def test_a_version_applied_while_it_is_being_heard_of_does_not_lag() -> None:
    """A thread listens to the registry while the server follows it by itself."""

    def follow() -> None:
        lag.observe(1)
        lag.apply(1)

    class Version(int):
        def __gt__(self, known: int) -> bool:
            newer = int(self) > known
            if collector.ident is None:
                collector.start()
                collector.join(0.2)
            return newer

    now_s = [0.0]
    lag = Lag(clock=lambda: now_s[0])
    collector = threading.Thread(target=follow)
    lag.observe(Version(1))
    collector.join()
    now_s[0] = 60.0
    assert (lag.known, lag.seconds()) == (1, 0.0)


def test_counts_of_the_registry(registry: Registry) -> None:  # noqa: F811
    registry.tenants.add("globex", FAMILY, actor="t")
    add_published(registry, "acme/support")
    add_published(registry, "acme/support")
    add_published(registry, "globex")
    registry.revisions.add("globex", profile(), actor="t")
    for _ in range(2):
        registry.jobs.enqueue("onboard", "globex", actor="t")
    registry.jobs.enqueue("calibrate", "globex", actor="t")
    registry.jobs.claim("me", actor="t", kinds=["calibrate"])
    live, late = (registry.replicas.join("host", pid, actor="t") for pid in (1, 2))
    registry.replicas.heartbeat(live.id, applied_version=registry.version(), actor="t")
    registry.replicas.heartbeat(late.id, applied_version=1, actor="t")
    found = registry.stats()
    assert found.version == registry.version()
    assert found.revisions == {"published": 2, "superseded": 1, "registered": 1}
    assert found.jobs == {("onboard", "queued"): 2, ("calibrate", "running"): 1}
    assert (found.live, found.late) == (1, 1)
    assert registry.stats(alive_s=-60.0).live == 0
    assert set(found.since) == {"acme/support", "globex"}

    # A tenant that is not served here has no timestamp here.
    collector = RegistryCollector(TenantLabels(), registry, Follower(names=["globex"]))
    asyncio.run(collector.export_counts())
    assert gauges("registry_up") == {"": 1}
    revisions = gauges("revisions")
    assert {state: n for state, n in revisions.items() if n} == found.revisions
    assert revisions["failed"] == 0
    assert gauges("replicas") == {"live": 1, "late": 1}
    assert gauges("jobs") == {"onboard,queued": 2, "calibrate,running": 1}
    at = found.since["globex"].timestamp()
    assert gauges("revision_published_timestamp_seconds") == {"globex": pytest.approx(at)}


class Silent:
    """A registry that responds once released, or reports that it is down."""

    def __init__(self, inner: Registry | None = None) -> None:
        self.inner = inner
        self.free = threading.Event()
        self.queries = 0

    def stats(self) -> Any:
        self.queries += 1
        if self.inner is None:
            raise RegistryDownError("the registry does not respond")
        assert self.free.wait(30)
        return self.inner.stats()


def test_a_registry_that_is_down() -> None:
    collector = RegistryCollector(TenantLabels(), Silent(), Follower())  # type: ignore[arg-type]
    asyncio.run(collector.export_counts())
    assert gauges("registry_up") == {"": 0}


def test_a_hanging_registry_has_one_query_in_flight(
    registry: Registry,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(collectors, "REGISTRY_TIMEOUT_S", 0.01)
    silent = Silent(registry)
    collector = RegistryCollector(TenantLabels(), silent, Follower())  # type: ignore[arg-type]

    async def run() -> None:
        for _ in range(3):
            await collector.export_counts()
            assert gauges("registry_up") == {"": 0}
        assert silent.queries == 1
        silent.free.set()
        async with asyncio.timeout(300):
            while not gauges("registry_up")[""]:
                await collector.export_counts()

    asyncio.run(run())


def test_all_of_these_are_gauges() -> None:
    with growth() as grown:
        asyncio.run(RegistryCollector(TenantLabels(), None, Follower()).export_lag())  # type: ignore[arg-type]
    assert not [name for name in grown.everything() if "_total" in name]
