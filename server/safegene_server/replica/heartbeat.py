"""Status reports of a replica to the registry: heartbeats, receipts of loaded revisions, unloads.

For one replica, under its lock. What the registry has not received is reported again.
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

RevisionReceipts = tuple[dict[str, Any], bool]
"""A revision's receipts from every rank, and whether they are as expected."""


class StatusReporter:
    """Reporter of one replica.

    On joining, `introduce` first adds what the registry needs to have, and `recall` returns the
    receipts of all loaded revisions.
    """

    def __init__(
        self,
        registry: Registry,
        introduce: Callable[[], Awaitable[None]],
        recall: Callable[[], Awaitable[Mapping[Identity, RevisionReceipts]]],
    ) -> None:
        self.registry, self.introduce, self.recall = registry, introduce, recall
        self.id = ""
        self._reported_s = time.monotonic()
        self._loaded: dict[Identity, RevisionReceipts] = {}
        self._unloaded: set[int] = set()
        self._stale = False

    def record_loaded(self, revision: Identity, receipts: RevisionReceipts) -> None:
        """Report the receipts of a loaded revision with the next heartbeat."""
        self._loaded[revision] = receipts
        self._unloaded.discard(revision.id)

    def record_unloaded(self, revision: Identity) -> None:
        """Report a revision as unloaded with the next heartbeat."""
        self._loaded.pop(revision, None)
        self._unloaded.add(revision.id)

    def restored(self) -> None:
        """Join as a new replica in place of the next heartbeat.

        The registry's row and receipts of this replica are those of its backup.
        """
        self._stale = True

    async def report(self, version: int, errors: Sequence[str], seen: Position | None) -> None:
        """Report the applied version, why it is not a later one, and the position `seen`.

        Errors: RegistryError and subclasses; the report is then part of the next one.
        """
        if self._stale:
            with suppress(NotFoundError):
                await asyncio.to_thread(self.registry.replicas.leave, self.id, actor=ACTOR)
            await self.join(version, errors, seen)
            return
        try:
            await self._send(version, errors, seen)
        except NotFoundError:
            await self.join(version, errors, seen)

    async def heartbeat(self, version: int, errors: Sequence[str], seen: Position | None) -> None:
        """Report during long work when a report is due; a failed one is retried with the next."""
        if time.monotonic() - self._reported_s >= BEAT_S:
            with suppress(SafegeneError):
                await self.report(version, errors, seen)

    async def join(self, version: int, errors: Sequence[str], seen: Position | None) -> None:
        """Join as a new replica and report all loaded revisions.

        Errors: RegistryError and subclasses; joining is retried with the next heartbeat.
        """
        self._stale = True
        await self.introduce()
        joined = await asyncio.to_thread(
            self.registry.replicas.join, socket.gethostname(), os.getpid(), actor=ACTOR
        )
        self.id = joined.id
        self._loaded, self._unloaded = dict(await self.recall()), set()
        self._stale = False
        if self._loaded:
            await self._send(version, errors, seen)

    async def _send(self, version: int, errors: Sequence[str], seen: Position | None) -> None:
        """Errors: NotFoundError for a replica that the registry has removed; RestoredError."""
        self._reported_s = time.monotonic()
        loaded, unloaded = dict(self._loaded), set(self._unloaded)
        await asyncio.to_thread(
            self.registry.replicas.heartbeat,
            self.id,
            applied_version=version,
            faults=errors,
            receipts={revision.id: receipts for revision, receipts in loaded.items()},
            contents=loaded,
            gone=unloaded,
            seen=seen,
            actor=ACTOR,
        )
        self._unloaded -= unloaded
        for revision in loaded:
            self._loaded.pop(revision, None)


def receipt_of(ranks: Sequence[dict[str, Any] | None], revision: int) -> RevisionReceipts:
    """Receipts of all ranks for one revision, marked as verified."""
    return {"ranks": [_rank_receipt(rank, revision) for rank in ranks]}, True


def _rank_receipt(rank: dict[str, Any] | None, revision: int) -> dict[str, Any]:
    adapters = [] if rank is None else rank["adapters"]
    found: dict[str, Any] = next((a for a in adapters if a["lora_int_id"] == revision), {})
    return {"rank": None if rank is None else rank["rank"], **found}
