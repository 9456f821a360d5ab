"""Asks what this engine serves, one tenant at a time, and remembers the last counts of each.

Whoever has been due for longest comes first; a new revision is due when it is first seen. Requests
go past keys, limits and counters, so no tenant pays for them. Nothing is written down: after a
restart everybody is due.
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

from safegene_server.error_responses import EngineDownError, plain
from safegene_server.monitoring.probes import gauges
from safegene_server.monitoring.probes.gauges import Labels, Outcome
from safegene_server.monitoring.probes.result import Result
from safegene_server.monitoring.probes.settings import ProbeSettings
from safegene_server.registry import Identity
from safegene_server.tenants import Prompt, Replica
from safegene_server.tenants.duty_cycle import DutyCycleLimiter
from safegene_server.tenants.jobs import JobCancelledError, JobLostError
from safegene_server.tenants.smoke_prompts import ask_all, digest, tally
from safegene_vllm.errors import (
    AdapterRejectedError,
    ConflictError,
    RegistryDownError,
    SafegeneError,
)

logger = logging.getLogger("vllm.safegene_server")
POLL_S = 1.0
RETRY_S = 300.0
"""After a probe that did not come to its end, where `every_s` is longer."""
NOT_ITS_FAULT = (ConflictError, JobCancelledError, JobLostError, RegistryDownError)
"""What ends a probe without saying anything about the tenant."""
UNEXPECTED = "the probe failed unexpectedly; the server's log says why"
Step = Callable[[float], Awaitable[None]]
"""Called with the share of questions asked, before each few. May raise, which ends the probe."""


@dataclass
class ProbeStatus:
    """How it stands with a tenant's revision, of this content; `due_s` is on the prober's clock.

    `outcome` and `message` are of the last probe, `result` of the last that was whole.
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


async def _no_step(_done: float) -> None:
    return


class Prober:
    """One process's probes. Start `run` as a task; cancel it to stop."""

    def __init__(
        self,
        replica: Replica,
        settings: ProbeSettings,
        prompts: Sequence[Prompt],
        labels: Labels,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.replica, self.settings, self.labels = replica, settings, labels
        self.prompts, self._digest = tuple(prompts), digest(prompts)
        self.clock = clock
        self._begun_s = clock()
        # Nobody waits for a scheduled probe, so it keeps to its share on an idle engine as well.
        self._scheduled = DutyCycleLimiter(settings.share, lambda: 1, clock=clock, sleep=sleep)
        self._by_hand = DutyCycleLimiter(
            settings.share, replica.in_flight, clock=clock, sleep=sleep
        )
        self._turn = asyncio.Lock()
        self._standings: dict[str, ProbeStatus] = {}

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._forever(self._watch))
            if self.settings.enabled:
                group.create_task(self._forever(self.probe_next))

    def standings(self) -> list[ProbeStatus]:
        """Everybody who is served here now, by name."""
        self.look()
        return [self._standings[tenant] for tenant in sorted(self._standings)]

    def look(self) -> None:
        """Forget what is not served here any more, also its gauges; note what is new."""
        offered, now_s = self._offered(), self.clock()
        for tenant, standing in list(self._standings.items()):
            if offered.get(tenant) != standing.content:
                del self._standings[tenant]
                if standing.result is not None:
                    gauges.clear(self.labels, standing.result)
        for tenant, content in offered.items():
            if tenant not in self._standings:
                self._standings[tenant] = ProbeStatus(tenant, content, now_s)
                if self.settings.enabled and self._chosen(tenant):
                    gauges.begin(self.labels, tenant)
        busy_s = self._scheduled.busy_s + self._by_hand.busy_s
        gauges.ENGINE_SHARE.set(busy_s / max(now_s - self._begun_s, 1e-9))

    async def probe_next(self) -> bool:
        """Probe whoever has been due for longest; False if nobody is."""
        self.look()
        now_s = self.clock()
        due = [
            (standing.due_s, self._place(tenant), tenant)
            for tenant, standing in self._standings.items()
            if standing.due_s <= now_s and self._chosen(tenant)
        ]
        if not due:
            return False
        tenant = min(due)[2]
        try:
            await self.probe(tenant)
        except (SafegeneError, EngineDownError) as error:
            logger.warning("SafeGene: probe of %s: %s", tenant, plain(error))
        return True

    async def probe(self, tenant: str, *, by_hand: bool = False, step: Step = _no_step) -> Result:
        """Ask everything of what the tenant serves here, and tell the gauges.

        Errors: ConflictError (nothing is served, or something else since it began);
        AdapterRejectedError, ReceiptError (the engine does not answer as it should); those of `step`.
        """
        self.look()
        standing = self._standings.get(tenant)
        if standing is None:
            raise ConflictError(f"tenant {tenant!r} is not served by this server; nothing to probe")
        share = self._by_hand if by_hand else self._scheduled
        try:
            result = await self._result(standing, share, step)
        except Exception as error:
            known = isinstance(error, (SafegeneError, EngineDownError))
            outcome: Outcome = "skipped" if isinstance(error, NOT_ITS_FAULT) else "failed"
            self._ended(standing, outcome, plain(error) if known else UNEXPECTED)
            raise
        self._ended(standing, "ok", "", result)
        return result

    async def _result(self, standing: ProbeStatus, share: DutyCycleLimiter, step: Step) -> Result:
        answers: list[str] = []
        # An engine that has lost a vector must not answer from what it computed when it had it.
        salt = uuid.uuid4().hex
        seconds = 0.0
        for begin in range(0, len(self.prompts), self.settings.concurrent):
            await step(begin / len(self.prompts))
            few = self.prompts[begin : begin + self.settings.concurrent]
            failure: Exception | None = None
            async with self._turn, share.turn():
                began_s = self.clock()
                try:
                    answers += await self._asked(standing, few, salt)
                except Exception as error:
                    # Raised after the pause: an engine that fails slowly is not asked all the time.
                    failure = error
                seconds += self.clock() - began_s
            if failure is not None:
                raise failure
        return Result(
            tenant=standing.tenant,
            revision=standing.served,
            replica=self.replica.id,
            at=datetime.now(UTC),
            seconds=seconds,
            tally=tally(self.prompts, answers),
            max_tokens=self.settings.max_tokens,
            prompts=self._digest,
        )

    async def _asked(self, standing: ProbeStatus, few: Sequence[Prompt], salt: str) -> list[str]:
        served, settings = standing.served, self.settings
        if self._offered().get(standing.tenant) != standing.content:
            raise ConflictError(f"{served} was replaced or retired while it was probed")
        by_priority = self.replica.schedules_by_priority()
        try:
            with self.replica.keeping(served):
                async with asyncio.timeout(settings.timeout_s):
                    return await ask_all(
                        self.replica,
                        served,
                        few,
                        concurrent=settings.concurrent,
                        max_tokens=settings.max_tokens,
                        priority=settings.priority if by_priority else None,
                        salt=salt,
                    )
        except TimeoutError:
            raise AdapterRejectedError(
                f"{served}: {len(few)} questions of a probe took longer than "
                f"{settings.timeout_s:g} s; raise probes.timeout_s if the engine is only busy"
            ) from None

    def _ended(
        self, standing: ProbeStatus, outcome: Outcome, message: str, result: Result | None = None
    ) -> None:
        gauges.count(self.labels, standing.tenant, outcome)
        pause_s = self.settings.every_s
        standing.due_s = self.clock() + (pause_s if result else min(pause_s, RETRY_S))
        standing.outcome, standing.message = outcome, message
        if result is not None:
            standing.result = result
            if self._standings.get(standing.tenant) is standing:
                gauges.show(self.labels, result)
        self.look()

    def _offered(self) -> dict[str, Identity]:
        return {tenant: revision.identity for tenant, revision in self.replica.offered()}

    def _chosen(self, tenant: str) -> bool:
        return not self.settings.tenants or tenant in self.settings.tenants

    def _place(self, tenant: str) -> bytes:
        """The order among those due since the same moment: another one on every replica."""
        return hashlib.sha256(f"{self.replica.id} {tenant}".encode()).digest()

    async def _watch(self) -> bool:
        self.look()
        return False

    async def _forever(self, once: Callable[[], Awaitable[bool]]) -> None:
        while True:
            try:
                if await once():
                    continue
            except Exception:
                logger.exception("SafeGene: a probe failed unexpectedly")
            await asyncio.sleep(POLL_S)
