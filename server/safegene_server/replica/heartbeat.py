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

from safegene_server.registry import Identity, Position, Registry
from safegene_vllm.errors import NotFoundError, SafegeneError

ACTOR = "replica"
BEAT_S = 2.0

Told = tuple[dict[str, Any], bool]
"""A revision's receipts from every rank, and whether they are as promised."""


class StatusReporter:
    """`introduce` adds what a replica needs to be there; `recall` gives the receipts of all that is
    held: for a registry that does not know us, or no longer."""

    def __init__(
        self,
        registry: Registry,
        introduce: Callable[[], Awaitable[None]],
        recall: Callable[[], Awaitable[Mapping[Identity, Told]]],
    ) -> None:
        self.registry, self.introduce, self.recall = registry, introduce, recall
        self.id = ""
        self._told_s = time.monotonic()
        self._came: dict[Identity, Told] = {}
        self._gone: set[int] = set()
        self._stale = False

    def came(self, revision: Identity, told: Told) -> None:
        self._came[revision] = told
        self._gone.discard(revision.id)

    def went(self, revision: Identity) -> None:
        self._came.pop(revision, None)
        self._gone.add(revision.id)

    def restored(self) -> None:
        """Join again as a new replica, with all that it holds, in place of the next sign of life:
        the registry's row and receipts are those of its backup."""
        self._stale = True

    async def tell(self, version: int, faults: Sequence[str], seen: Position | None) -> None:
        """Report how far this replica is in a registry of which it has `seen` so much.

        Errors: RegistryError and its kinds; nothing of it is lost then.
        """
        if self._stale:
            with suppress(NotFoundError):
                await asyncio.to_thread(self.registry.leave, self.id, actor=ACTOR)
            await self.join(version, faults, seen)
            return
        try:
            await self._report(version, faults, seen)
        except NotFoundError:
            await self.join(version, faults, seen)

    async def live(self, version: int, faults: Sequence[str], seen: Position | None) -> None:
        """A sign of life in long work, when one is due; what fails is told again with the next."""
        if time.monotonic() - self._told_s >= BEAT_S:
            with suppress(SafegeneError):
                await self.tell(version, faults, seen)

    async def join(self, version: int, faults: Sequence[str], seen: Position | None) -> None:
        """A new replica, with all that it holds. Errors: RegistryError and its kinds; it is tried
        again with the next sign of life."""
        self._stale = True
        await self.introduce()
        joined = await asyncio.to_thread(
            self.registry.join, socket.gethostname(), os.getpid(), actor=ACTOR
        )
        self.id = joined.id
        self._came, self._gone = dict(await self.recall()), set()
        self._stale = False
        if self._came:
            await self._report(version, faults, seen)

    async def _report(self, version: int, faults: Sequence[str], seen: Position | None) -> None:
        """Errors: NotFoundError for a replica that the registry has forgotten; RestoredError."""
        self._told_s = time.monotonic()
        came, gone = dict(self._came), set(self._gone)
        await asyncio.to_thread(
            self.registry.heartbeat,
            self.id,
            applied_version=version,
            faults=faults,
            receipts={revision.id: told for revision, told in came.items()},
            contents=came,
            gone=gone,
            seen=seen,
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
