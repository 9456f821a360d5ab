"""Prober: sends prompts to the served tenants, one at a time, and keeps the last counts.

The tenant overdue for longest comes first; a new revision is due when it is first seen. Requests
bypass keys, limits and counters, so no tenant pays for them. Nothing is persisted: after a restart
every tenant is due.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from safegene_server.error_responses import EngineDownError, plain, public_message
from safegene_server.metrics.labels import TenantLabels
from safegene_server.monitoring.probes import gauges
from safegene_server.monitoring.probes.gauges import Outcome
from safegene_server.monitoring.probes.result import Result
from safegene_server.monitoring.probes.settings import ProbeSettings
from safegene_server.registry import Identity
from safegene_server.tenants import Prompt, Replica
from safegene_server.tenants.duty_cycle import DutyCycleLimiter
from safegene_server.tenants.jobs import JobCancelledError, JobLostError
from safegene_server.tenants.smoke_prompts import digest, generate_all, tally
from safegene_vllm.errors import (
    AdapterRejectedError,
    ConflictError,
    RegistryDownError,
    SafegeneError,
)

logger = logging.getLogger("vllm.safegene_server")
POLL_S = 1.0
RETRY_S = 300.0
"""Pause after a probe that did not complete, unless `every_s` is shorter."""
SKIPPED = (ConflictError, JobCancelledError, JobLostError, RegistryDownError)
"""Errors that end a probe and say nothing about the tenant."""
UNEXPECTED = "the probe failed unexpectedly; the server's log says why"
Step = Callable[[float], Awaitable[None]]
"""Called with the share of prompts sent, before each few. May raise, which ends the probe."""


@dataclass
class ProbeStatus:
    """Probes of a tenant's revision, of this content; `due_s` is on the prober's clock.

    `outcome` and `message` are of the last probe, `result` of the last that completed.
    """

    tenant: str
    content: Identity
    due_s: float
    outcome: Outcome | None = None
    message: str = ""
    result: Result | None = None

    @property
    def served(self) -> str:
        return self.content.name

    def record(self) -> dict[str, Any]:
        """Return the status as the API shows it."""
        return {
            "tenant": self.tenant,
            "served": self.served,
            "outcome": self.outcome,
            "message": self.message,
            "result": None if self.result is None else self.result.record(),
        }


async def _no_step(_done: float) -> None:
    return


class Prober:
    """Probes of one process. Start `run` as a task; cancel it to stop."""

    def __init__(
        self,
        replica: Replica,
        settings: ProbeSettings,
        prompts: Sequence[Prompt],
        labels: TenantLabels,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.replica, self.settings, self.labels = replica, settings, labels
        self.prompts, self._digest = tuple(prompts), digest(prompts)
        self.clock = clock
        self._started_s = clock()
        # A scheduled probe is not urgent, so it keeps to its share on an idle engine too.
        self._scheduled = DutyCycleLimiter(settings.share, lambda: 1, clock=clock, sleep=sleep)
        self._on_request = DutyCycleLimiter(
            settings.share, replica.in_flight, clock=clock, sleep=sleep
        )
        self._turn = asyncio.Lock()
        self._statuses: dict[str, ProbeStatus] = {}

    async def run(self) -> None:
        """Probe until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._forever(self._refresh_only))
            if self.settings.enabled:
                group.create_task(self._forever(self.probe_next))

    def statuses(self) -> list[ProbeStatus]:
        """Return the status of every tenant served here now, by name."""
        self.refresh()
        return [self._statuses[tenant] for tenant in sorted(self._statuses)]

    def refresh(self) -> None:
        """Drop what is no longer served here, and its gauges; add what is new."""
        offered, now_s = self._offered(), self.clock()
        for tenant, status in list(self._statuses.items()):
            if offered.get(tenant) != status.content:
                del self._statuses[tenant]
                if status.result is not None:
                    gauges.clear(self.labels, status.result)
        for tenant, content in offered.items():
            if tenant not in self._statuses:
                self._statuses[tenant] = ProbeStatus(tenant, content, now_s)
                if self.settings.enabled and self._selected(tenant):
                    gauges.begin(self.labels, tenant)
        busy_s = self._scheduled.busy_s + self._on_request.busy_s
        gauges.ENGINE_SHARE.set(busy_s / max(now_s - self._started_s, 1e-9))

    async def probe_next(self) -> bool:
        """Probe the tenant overdue for longest; return False if none is due."""
        self.refresh()
        now_s = self.clock()
        due = [
            (status.due_s, self._order(tenant), tenant)
            for tenant, status in self._statuses.items()
            if status.due_s <= now_s and self._selected(tenant)
        ]
        if not due:
            return False
        tenant = min(due)[2]
        try:
            await self.probe(tenant)
        except (SafegeneError, EngineDownError) as error:
            logger.warning("SafeGene: probe of %s: %s", tenant, plain(error))
        return True

    async def probe(
        self, tenant: str, *, on_request: bool = False, step: Step = _no_step
    ) -> Result:
        """Send all prompts to what the tenant serves here, and export the counts.

        Errors: ConflictError (nothing is served, or another revision since it started);
        AdapterRejectedError, ReceiptError (the engine does not respond as it should); those of
        `step`.
        """
        self.refresh()
        status = self._statuses.get(tenant)
        if status is None:
            raise ConflictError(f"tenant {tenant!r} is not served by this server; nothing to probe")
        limiter = self._on_request if on_request else self._scheduled
        try:
            result = await self._run(status, limiter, step)
        except Exception as error:
            known = isinstance(error, (SafegeneError, EngineDownError))
            outcome: Outcome = "skipped" if isinstance(error, SKIPPED) else "failed"
            self._ended(status, outcome, public_message(error) if known else UNEXPECTED)
            raise
        self._ended(status, "ok", "", result)
        return result

    async def _run(self, status: ProbeStatus, limiter: DutyCycleLimiter, step: Step) -> Result:
        completions: list[str] = []
        # The salt keeps the prefix cache from hiding that the engine has lost a vector.
        salt = uuid.uuid4().hex
        seconds = 0.0
        for start in range(0, len(self.prompts), self.settings.concurrent):
            await step(start / len(self.prompts))
            batch = self.prompts[start : start + self.settings.concurrent]
            failure: Exception | None = None
            async with self._turn, limiter.turn():
                started_s = self.clock()
                try:
                    completions += await self._send(status, batch, salt)
                except Exception as error:
                    # Raised after the limiter's pause, so that failures take their share too.
                    failure = error
                seconds += self.clock() - started_s
            if failure is not None:
                raise failure
        return Result(
            tenant=status.tenant,
            revision=status.served,
            replica=self.replica.id,
            at=datetime.now(UTC),
            seconds=seconds,
            tally=tally(self.prompts, completions),
            max_tokens=self.settings.max_tokens,
            prompts=self._digest,
        )

    async def _send(self, status: ProbeStatus, batch: Sequence[Prompt], salt: str) -> list[str]:
        served, settings = status.served, self.settings
        if self._offered().get(status.tenant) != status.content:
            raise ConflictError(f"{served} was replaced or retired while it was probed")
        by_priority = self.replica.schedules_by_priority()
        try:
            with self.replica.in_use(served):
                async with asyncio.timeout(settings.timeout_s):
                    return await generate_all(
                        self.replica,
                        served,
                        batch,
                        concurrent=settings.concurrent,
                        max_tokens=settings.max_tokens,
                        priority=settings.priority if by_priority else None,
                        salt=salt,
                    )
        except TimeoutError:
            raise AdapterRejectedError(
                f"{served}: {len(batch)} prompts of a probe took longer than "
                f"{settings.timeout_s:g} s; raise probes.timeout_s if the engine is only busy"
            ) from None

    def _ended(
        self, status: ProbeStatus, outcome: Outcome, message: str, result: Result | None = None
    ) -> None:
        gauges.count(self.labels, status.tenant, outcome)
        pause_s = self.settings.every_s
        status.due_s = self.clock() + (pause_s if result else min(pause_s, RETRY_S))
        status.outcome, status.message = outcome, message
        if result is not None:
            status.result = result
            if self._statuses.get(status.tenant) is status:
                gauges.show(self.labels, result)
        self.refresh()

    def _offered(self) -> dict[str, Identity]:
        return {tenant: revision.identity for tenant, revision in self.replica.served()}

    def _selected(self, tenant: str) -> bool:
        return not self.settings.tenants or tenant in self.settings.tenants

    def _order(self, tenant: str) -> bytes:
        """Return the order among tenants due at the same time, different on every replica."""
        return hashlib.sha256(f"{self.replica.id} {tenant}".encode()).digest()

    async def _refresh_only(self) -> bool:
        self.refresh()
        return False

    async def _forever(self, once: Callable[[], Awaitable[bool]]) -> None:
        while True:
            try:
                if await once():
                    continue
            except Exception:
                logger.exception("SafeGene: a probe failed unexpectedly")
            await asyncio.sleep(POLL_S)
