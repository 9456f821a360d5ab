"""Execution of the registry's jobs in this process: claim, lease, cancellation, end.

Handlers do the work. A job whose process dies is claimed by another when its lease has run out, and
one whose process stops is released, so every step of a handler may run twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from safegene_server.error_responses import EngineDownError, plain, public_message
from safegene_server.metrics import definitions
from safegene_server.registry import Job, Registry
from safegene_server.registry.jobs import MAX_ATTEMPTS
from safegene_server.tenants.context import TenantContext
from safegene_vllm.errors import (
    ConflictError,
    NotFoundError,
    RegistryDownError,
    SafegeneError,
)

logger = logging.getLogger("vllm.safegene_server")
PULSE_S = 2.0


class JobCancelledError(SafegeneError):
    """The job was cancelled."""


class JobLostError(Exception):
    """Another owner holds the job now, and does the rest."""


@dataclass
class Work:
    """A claimed job while it runs here; `result` is stored also if it fails.

    `cancelled` is for threads to check while they are busy.
    """

    registry: Registry
    owner: str
    actor: str
    job: Job
    lease_s: float
    result: dict[str, Any] = field(default_factory=dict)
    cancelled: threading.Event = field(default_factory=threading.Event)
    begun_s: float = field(default_factory=time.monotonic)
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def step(self, progress: float, message: str) -> None:
        """Report progress. Errors: JobCancelledError, JobLostError, RegistryDownError."""
        async with self._lock:
            await self._report(progress, message)
        if self.cancelled.is_set():
            raise JobCancelledError("the job was cancelled")

    async def keep_alive(self) -> None:
        """Renew the lease until another owner holds the job."""
        renewed_s = time.monotonic()
        while time.monotonic() - renewed_s < self.lease_s:
            await asyncio.sleep(min(PULSE_S, self.lease_s / 4))
            async with self._lock:
                try:
                    await self._report(self.job.progress, self.job.message)
                except RegistryDownError as error:
                    logger.warning("SafeGene job %d: %s", self.job.id, error)
                except JobLostError:
                    return
                else:
                    renewed_s = time.monotonic()

    async def finish(self, state: Literal["done", "failed", "cancelled"], message: str) -> None:
        """End the job, under the lock: no later lease renewal reports an ended job."""
        async with self._lock:
            await asyncio.to_thread(
                self.registry.jobs.finish,
                self.job.id,
                self.owner,
                state,
                actor=self.actor,
                message=message,
                result=self.result,
            )
        definitions.JOB_SECONDS.labels(self.job.kind).observe(time.monotonic() - self.begun_s)

    async def release(self) -> None:
        """Release the job to another server; it is left to its lease if the registry is down."""
        async with self._lock:
            try:
                await asyncio.to_thread(
                    self.registry.jobs.release, self.job.id, self.owner, actor=self.actor
                )
            except SafegeneError as error:
                logger.warning("SafeGene job %d is left to its lease: %s", self.job.id, error)

    async def _report(self, progress: float, message: str) -> None:
        try:
            self.job = await asyncio.to_thread(
                self.registry.jobs.progress,
                self.job.id,
                self.owner,
                progress,
                message,
                actor=self.actor,
                lease_s=self.lease_s,
            )
        except (ConflictError, NotFoundError) as error:
            raise JobLostError(str(error)) from error
        if self.job.cancel_requested:
            self.cancelled.set()


Handler = Callable[[TenantContext, Work], Awaitable[str]]
"""Do a job and return the message of its success. Errors: SafegeneError, EngineDownError."""


class Jobs:
    """Runner of the jobs that have a handler. Start `run` as a task; cancel it to stop."""

    def __init__(self, tenancy: TenantContext, handlers: Mapping[str, Handler]) -> None:
        self.tenancy, self.handlers = tenancy, dict(handlers)

    async def run(self) -> None:
        """Run jobs until cancelled; those that are running then are released."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self.tenancy.settings.jobs_at_once):
                group.create_task(self._serve(self.tenancy.settings.poll_s))

    async def _serve(self, poll_s: float) -> None:
        while True:
            try:
                if not await self.run_one():
                    await self._idle(poll_s)
            except RegistryDownError as error:
                logger.warning("SafeGene jobs wait: %s", error)
                await asyncio.sleep(poll_s)
            except Exception:
                logger.exception("SafeGene jobs: a job could not be ended")
                await asyncio.sleep(poll_s)

    async def run_one(self) -> bool:
        """Claim the oldest queued job and do it; return False if there was none."""
        claiming = asyncio.create_task(self._claim())
        try:
            work = await asyncio.shield(claiming)
        except asyncio.CancelledError:
            # The thread that claims goes on; a job that it holds by then has not been begun.
            with contextlib.suppress(SafegeneError):
                if (late := await claiming) is not None:
                    await late.release()
            raise
        if work is None:
            return False
        await self._do(work)
        return True

    async def _claim(self) -> Work | None:
        tenancy = self.tenancy
        # An owner per claim: a registry that was restored may offer a job that still runs here, or
        # give its id to another one.
        actor, lease_s = tenancy.replica.id, tenancy.settings.lease_s
        owner = f"{actor}/{uuid.uuid4().hex}"
        job = await asyncio.to_thread(
            tenancy.registry.jobs.claim,
            owner,
            actor=actor,
            kinds=list(self.handlers),
            family=tenancy.replica.header.digest,
            lease_s=lease_s,
        )
        return None if job is None else Work(tenancy.registry, owner, actor, job, lease_s)

    async def _do(self, work: Work) -> None:
        async def handled() -> str:
            return await self.handlers[work.job.kind](self.tenancy, work)

        doing, alive = asyncio.create_task(handled()), asyncio.create_task(work.keep_alive())
        stopping = False
        try:
            await asyncio.wait({doing, alive}, return_when=asyncio.FIRST_COMPLETED)
            if not doing.done():
                logger.warning("SafeGene job %d is held by another server now", work.job.id)
                return
            await _end(work, doing)
        except asyncio.CancelledError:
            stopping = not doing.done()
            raise
        finally:
            work.cancelled.set()
            doing.cancel()
            alive.cancel()
            await asyncio.wait({doing, alive})
            if stopping and doing.cancelled():
                await work.release()
            for task in (doing, alive):
                if not task.cancelled():
                    task.exception()

    async def _idle(self, poll_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.tenancy.job_added.wait(), poll_s)
        self.tenancy.job_added.clear()


async def _end(work: Work, doing: asyncio.Task[str]) -> None:
    """Store the outcome of a job.

    One that failed because the registry or the engine is down is left to its lease, and restarted.
    """
    try:
        message = doing.result()
    except JobLostError:
        return
    except (RegistryDownError, EngineDownError) as error:
        logger.error(
            "SafeGene job %d broke off in attempt %d of %d, and is left to its lease: %s",
            work.job.id,
            work.job.attempts,
            MAX_ATTEMPTS,
            plain(error),
        )
    except JobCancelledError as error:
        await work.finish("cancelled", str(error))
    except SafegeneError as error:
        logger.error("SafeGene job %d (%s) failed: %s", work.job.id, work.job.kind, plain(error))
        await work.finish("failed", public_message(error))
    except Exception:
        logger.exception("SafeGene job %d (%s) failed", work.job.id, work.job.kind)
        await work.finish("failed", "the job failed unexpectedly; the server's log says why")
    else:
        await work.finish("done", message)
