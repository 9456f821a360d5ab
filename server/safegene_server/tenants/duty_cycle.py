"""Limit on the engine time that calibration and probes take while tenants are served.

Counted is the wall time during which their requests are in the engine; the true share is lower,
since tenants' requests run in the same steps.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any


class DutyCycleLimiter:
    """Limiter to a share of `most`.

    `others()` counts the tenants' requests in flight (always 1: limited on an idle engine too);
    `check()` may raise to end the work.
    """

    def __init__(
        self,
        most: float,
        others: Callable[[], int],
        check: Callable[[], None] = lambda: None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.most, self.others, self.check = most, others, check
        self.clock, self.sleep = clock, sleep
        self.begun = clock()
        self.busy_s = 0.0
        self._shared_busy_s = 0.0
        self._shared_s = 0.0

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Do one piece of work in the engine; pause afterwards if tenants are being served.

        Errors: what `check` raises, before the work.
        """
        self.check()
        began, with_others = self.clock(), self.others() > 0
        try:
            yield
        finally:
            took = self.clock() - began
            self.busy_s += took
        if with_others or self.others() > 0:
            await self.sleep(took * (1.0 - self.most) / self.most)
            self._shared_busy_s += took
            self._shared_s += self.clock() - began

    def record(self) -> dict[str, Any]:
        """Seconds in total and in the engine; `share_while_serving`: None without such time."""
        total_s = self.clock() - self.begun
        shared = self._shared_busy_s / self._shared_s if self._shared_s else None
        return {
            "seconds": round(total_s, 2),
            "busy_seconds": round(self.busy_s, 2),
            "share": round(self.busy_s / total_s, 4) if total_s else 0.0,
            "share_while_serving": None if shared is None else round(shared, 4),
            "share_limit": self.most,
        }
