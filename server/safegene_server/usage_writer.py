"""Writer of usage: adds what this process has counted to the registry, and deletes old days.

A process that is killed loses the counts of at most one period. While the registry is down, counts
stay in memory. A connection lost during a commit leaves unknown whether it happened; the counts are
then written again, so that usage may be too high by one period and is never too low.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta

from safegene_server.access.usage import UsageCounts
from safegene_server.registry import Registry
from safegene_vllm.errors import SafegeneError

logger = logging.getLogger("vllm.safegene_server")

PERIOD_S = 10.0


class UsageWriter:
    """Background task of one process. `now` returns Unix time in seconds."""

    def __init__(
        self,
        counts: UsageCounts,
        registry: Registry,
        keep_days: int,
        *,
        period_s: float = PERIOD_S,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._counts = counts
        self._registry = registry
        self._keep_days = keep_days
        self._period_s = period_s
        self._now = now
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._cleaned: date | None = None
        self._failing = False

    def start(self) -> None:
        """Start writing every period, in the running event loop."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Write what is left, and end. A write that has begun is not interrupted."""
        self._stopping.set()
        if self._task is not None:
            await self._task
        await self.flush()
        if left := self._counts.requests:
            logger.error("usage of %d requests is lost: it could not be written", left)

    async def flush(self) -> None:
        """Write the counts, and once a day delete old rows; an error is logged, once in a row."""
        rows = self._counts.take()
        try:
            if rows:
                await asyncio.to_thread(self._registry.usage.add, rows)
                rows = []
            await self._delete_old()
        except Exception as error:
            self._counts.restore(rows)
            if not self._failing:
                known = isinstance(error, SafegeneError)
                logger.error(
                    "usage cannot be written; counts stay in memory until it can: %s",
                    error,
                    exc_info=not known,
                )
            self._failing = True
        else:
            if self._failing:
                logger.info("usage is written again")
            self._failing = False

    async def _run(self) -> None:
        while not self._stopping.is_set():
            await self.flush()
            try:
                await asyncio.wait_for(self._stopping.wait(), self._period_s)
            except TimeoutError:
                continue

    async def _delete_old(self) -> None:
        today = datetime.fromtimestamp(self._now(), UTC).date()
        if self._cleaned == today:
            return
        first = today - timedelta(days=self._keep_days - 1)
        deleted = await asyncio.to_thread(self._registry.usage.delete_before, first)
        self._cleaned = today
        if deleted:
            logger.info("usage: %d rows of days before %s are deleted", deleted, first)
