"""What a replica tells the registry of itself: signs of life, receipts of what came, what went.

For one replica, which calls it under its own lock. What has not arrived is told again.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from safegene_server.registry import Registry
from safegene_vllm.errors import NotFoundError, SafegeneError

ACTOR = "replica"
BEAT_S = 2.0

Told = tuple[dict[str, Any], bool]
"""A revision's receipts from every rank, and whether they are as promised."""


class StatusReporter:
    """`recall` gives the receipts of all that is held, for a registry that has forgotten us."""

    def __init__(
        self, registry: Registry, recall: Callable[[], Awaitable[Mapping[int, Told]]]
    ) -> None:
        self.registry, self.recall = registry, recall
        self.id = ""
        self._told_s = time.monotonic()
        self._came: dict[int, Told] = {}
        self._gone: set[int] = set()

    def came(self, revision: int, told: Told) -> None:
        self._came[revision] = told
        self._gone.discard(revision)

    def went(self, revision: int) -> None:
        self._came.pop(revision, None)
        self._gone.add(revision)

    async def tell(self, version: int, faults: Sequence[str]) -> None:
        """Errors: RegistryError and its kinds; nothing of it is lost then."""
        try:
            await self._report(version, faults)
        except NotFoundError:
            await self.join(version, faults)

    async def live(self, version: int, faults: Sequence[str]) -> None:
        """A sign of life in long work, when one is due; what fails is told again with the next."""
        if time.monotonic() - self._told_s >= BEAT_S:
            with suppress(SafegeneError):
                await self.tell(version, faults)

    async def join(self, version: int, faults: Sequence[str]) -> None:
        """A new replica, with all that it holds. Errors: RegistryError and its kinds."""
        joined = await asyncio.to_thread(
            self.registry.join, socket.gethostname(), os.getpid(), actor=ACTOR
        )
        self.id = joined.id
        self._came, self._gone = dict(await self.recall()), set()
        if self._came:
            await self._report(version, faults)

    async def _report(self, version: int, faults: Sequence[str]) -> None:
        """Errors: NotFoundError for a replica that the registry has forgotten."""
        self._told_s = time.monotonic()
        came, gone = dict(self._came), set(self._gone)
        await asyncio.to_thread(
            self.registry.heartbeat,
            self.id,
            applied_version=version,
            faults=faults,
            receipts=came,
            gone=gone,
            actor=ACTOR,
        )
        self._gone -= gone
        for revision in came:
            self._came.pop(revision, None)


def receipt_of(ranks: Sequence[dict[str, Any] | None], revision: int) -> Told:
    """What all ranks report of one revision, and that it keeps its promise."""
    return {"ranks": [_of(rank, revision) for rank in ranks]}, True


def _of(rank: dict[str, Any] | None, revision: int) -> dict[str, Any]:
    adapters = [] if rank is None else rank["adapters"]
    found: dict[str, Any] = next((a for a in adapters if a["lora_int_id"] == revision), {})
    return {"rank": None if rank is None else rank["rank"], **found}
