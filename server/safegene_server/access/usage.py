"""Usage by day, tenant and key, counted in memory until it is written to the registry.

A request costs a few additions. What is counted here is lost only with the process.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from datetime import UTC, datetime

from safegene_server.registry import UsageRow

logger = logging.getLogger("vllm.safegene_server")

DAY_S = 86400
MAX_ROWS = 50_000
"""Most rows in memory, a row per day, tenant and key: some 20 MB, while the registry is down."""

MAX_TOKENS = 2**31 - 1
"""Most tokens of one request that are counted, so that no sum exceeds a database's integer."""


class UsageCounts:
    """Counts that are not in the registry yet. Not safe to share between threads.

    `dropped` are the requests since the last `take` that exceeded `max_rows` rows.
    """

    def __init__(self, max_rows: int = MAX_ROWS) -> None:
        self._max_rows = max_rows
        self._rows: dict[tuple[int, str, str], list[int]] = {}
        self.dropped = 0

    @property
    def requests(self) -> int:
        """Requests that are counted here."""
        return sum(counts[0] for counts in self._rows.values())

    def add(
        self, tenant: str, key: str, prompt_tokens: int, completion_tokens: int, now_s: float
    ) -> None:
        """Count a request that ends at `now_s`, in Unix time, on its day in UTC."""
        prompt_tokens = min(prompt_tokens, MAX_TOKENS)
        completion_tokens = min(completion_tokens, MAX_TOKENS)
        row = (int(now_s // DAY_S), tenant, key)
        self._add(row, 1, prompt_tokens, completion_tokens)

    def take(self) -> list[UsageRow]:
        """Return all rows, and count from 0 again."""
        if self.dropped:
            logger.error(
                "usage of %d requests is lost: %d rows were not written to the registry in time",
                self.dropped,
                self._max_rows,
            )
        self.dropped = 0
        taken, self._rows = self._rows, {}
        return [
            UsageRow(datetime.fromtimestamp(day * DAY_S, UTC).date(), tenant, key, *counts)
            for (day, tenant, key), counts in taken.items()
        ]

    def restore(self, rows: Iterable[UsageRow]) -> None:
        """Add rows that were taken and not written."""
        first = datetime.fromtimestamp(0, UTC).date()
        for row in rows:
            key = ((row.day - first).days, row.tenant, row.key)
            self._add(key, row.requests, row.prompt_tokens, row.completion_tokens)

    def _add(self, row: tuple[int, str, str], *counts: int) -> None:
        found = self._rows.get(row)
        if found is not None:
            for index, count in enumerate(counts):
                found[index] += count
        elif len(self._rows) < self._max_rows:
            self._rows[row] = list(counts)
        else:
            self.dropped += counts[0]
