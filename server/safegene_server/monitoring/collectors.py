"""Periodic updates of one server's gauges: receipts, registry, and this replica's lag.

One task per source, so that one that does not respond stops no other.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from safegene_server.metrics import definitions
from safegene_server.metrics.labels import TenantLabels
from safegene_server.metrics.series import Labels, Series
from safegene_server.monitoring.applied import STATES
from safegene_server.registry import Registry, Revision
from safegene_server.registry.stats import RegistryStats
from safegene_server.replica.lag import Lag
from safegene_vllm.errors import RegistryDownError

logger = logging.getLogger("vllm.safegene_server")

LAG_S = 2.0
"""Interval of exporting this replica's lag."""
REGISTRY_TIMEOUT_S = 10.0
"""Response time after which the registry counts as down."""


class ReplicaStatus(Protocol):
    """The exported properties of a replica."""

    @property
    def version(self) -> int: ...
    @property
    def lag(self) -> Lag: ...
    def problems(self) -> tuple[str, ...]: ...
    def served(self) -> Sequence[tuple[str, Revision]]: ...


class Collectors:
    """Update loops of one process, to be started and stopped in its event loop."""

    def __init__(self, period_s: float, verify: Callable[[], Awaitable[object]]) -> None:
        """`verify` makes a report of the verifier, which `Applied` exports."""
        self.period_s = period_s
        self.verify = verify
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, *steps: tuple[Callable[[], Awaitable[object]], float]) -> None:
        """Verify every `period_s`, and run each of `steps` at its own interval in seconds."""
        for step, every_s in ((self.verify, self.period_s), *steps):
            self._tasks.append(asyncio.create_task(_forever(step, every_s)))

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _forever(step: Callable[[], Awaitable[object]], every_s: float) -> None:
    while True:
        try:
            await step()
        except Exception:
            logger.exception("metrics could not be updated")
        await asyncio.sleep(every_s)


class RegistryCollector:
    """Gauges of a server with a registry: the registry's counts, and this replica's state."""

    def __init__(self, labels: TenantLabels, registry: Registry, replica: ReplicaStatus) -> None:
        self.labels = labels
        self.registry = registry
        self.replica = replica
        self._query: asyncio.Future[RegistryStats] | None = None
        self._gauges = definitions.replica_gauges()
        self._jobs = Series(definitions.JOBS)
        self._since = Series(definitions.PUBLISHED_AT)

    def steps(self, period_s: float) -> Sequence[tuple[Callable[[], Awaitable[object]], float]]:
        """Return the steps for `Collectors.start`."""
        return (self.export_lag, min(LAG_S, period_s)), (self.export_counts, period_s)

    async def export_lag(self) -> None:
        """Export readiness and lag of this replica, without a query."""
        faults = self.replica.problems()
        self._gauges.ready.set(not faults)
        self._gauges.faults.set(len(faults))
        definitions.REGISTRY_VERSION.labels("known").set(self.replica.lag.known)
        definitions.REGISTRY_VERSION.labels("applied").set(self.replica.version)
        self._gauges.lag.set(self.replica.lag.seconds())

    async def export_counts(self) -> None:
        """Export the registry's counts, or that it is down; one query at a time."""
        if self._query is None:
            self._query = asyncio.ensure_future(asyncio.to_thread(self.registry.stats))
        try:
            figures = await asyncio.wait_for(asyncio.shield(self._query), REGISTRY_TIMEOUT_S)
        except TimeoutError:
            # The thread still waits; the next run awaits the same query.
            self._gauges.registry_up.set(0)
            return
        except RegistryDownError:
            self._query = None
            self._gauges.registry_up.set(0)
            return
        except Exception:
            self._query = None
            raise
        self._query = None
        self._gauges.registry_up.set(1)
        for state in STATES:
            definitions.REVISIONS.labels(state).set(figures.revisions.get(state, 0))
        definitions.REPLICAS.labels("live").set(figures.live)
        definitions.REPLICAS.labels("late").set(figures.late)
        self._jobs.replace({(kind, state): n for (kind, state), n in figures.jobs.items()})
        since: dict[Labels, float] = {
            (tenant,): at.timestamp()
            for tenant, _ in self.replica.served()
            if self.labels.has_own(tenant) and (at := figures.since.get(tenant)) is not None
        }
        self._since.replace(since)
