"""Keeps the gauges of one server up to date: receipts, registry, and how far this replica is.

One task per source, so that one that does not answer stops no other. Reads only; takes no lock.
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

LEVEL_S = 2.0
"""How often it is looked how far this replica is, which costs next to nothing."""
PATIENCE_S = 10.0
"""How long the registry may take to answer before it counts as down."""


class ReplicaStatus(Protocol):
    """What is looked at of a replica."""

    @property
    def version(self) -> int: ...
    @property
    def lag(self) -> Lag: ...
    def faults(self) -> tuple[str, ...]: ...
    def offered(self) -> Sequence[tuple[str, Revision]]: ...


class Collectors:
    """Loops of one process; `start` them in its event loop and `stop` them there."""

    def __init__(self, period_s: float, look: Callable[[], Awaitable[object]]) -> None:
        """`look` has the verifier look at the receipts, and tell `Applied` what it found."""
        self.period_s = period_s
        self.look = look
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, *steps: tuple[Callable[[], Awaitable[object]], float]) -> None:
        """Look every `period_s`; `steps` are done every so many seconds, at once at first."""
        for step, every_s in ((self.look, self.period_s), *steps):
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
            logger.exception("metrics could not be renewed")
        await asyncio.sleep(every_s)


class Following:
    """Gauges of a server with a registry: the registry's own counts, and this replica's state."""

    def __init__(self, labels: TenantLabels, registry: Registry, replica: ReplicaStatus) -> None:
        self.labels = labels
        self.registry = registry
        self.replica = replica
        self._asked: asyncio.Future[RegistryStats] | None = None
        self._gauges = definitions.replica_gauges()
        self._jobs = Series(definitions.JOBS)
        self._since = Series(definitions.PUBLISHED_AT)

    def steps(self, period_s: float) -> Sequence[tuple[Callable[[], Awaitable[object]], float]]:
        """For `Observing.start`."""
        return (self.level, min(LEVEL_S, period_s)), (self.count, period_s)

    async def level(self) -> None:
        """How far this replica is; costs no question."""
        faults = self.replica.faults()
        self._gauges.ready.set(not faults)
        self._gauges.faults.set(len(faults))
        definitions.REGISTRY_VERSION.labels("known").set(self.replica.lag.known)
        definitions.REGISTRY_VERSION.labels("applied").set(self.replica.version)
        self._gauges.lag.set(self.replica.lag.seconds())

    async def count(self) -> None:
        """What the registry counts, or that it does not answer; one question at a time."""
        if self._asked is None:
            self._asked = asyncio.ensure_future(asyncio.to_thread(self.registry.figures))
        try:
            figures = await asyncio.wait_for(asyncio.shield(self._asked), PATIENCE_S)
        except TimeoutError:
            # The thread is still waiting; it is asked about next time.
            self._gauges.registry_up.set(0)
            return
        except RegistryDownError:
            self._asked = None
            self._gauges.registry_up.set(0)
            return
        except Exception:
            self._asked = None
            raise
        self._asked = None
        self._gauges.registry_up.set(1)
        for state in STATES:
            definitions.REVISIONS.labels(state).set(figures.revisions.get(state, 0))
        definitions.REPLICAS.labels("live").set(figures.level)
        definitions.REPLICAS.labels("late").set(figures.late)
        self._jobs.replace({(kind, state): n for (kind, state), n in figures.jobs.items()})
        since: dict[Labels, float] = {
            (tenant,): at.timestamp()
            for tenant, _ in self.replica.offered()
            if self.labels.own(tenant) and (at := figures.since.get(tenant)) is not None
        }
        self._since.replace(since)
