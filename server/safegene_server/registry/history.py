"""Position of one process in a registry's history, shared by its threads.

Every read is compared with the newest position that any read before has found, so a registry that
was restored is noticed by the first read after it. What follows from that is decided elsewhere.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass

from safegene_server.registry.records import Position, Snapshot
from safegene_server.registry.store import Registry

logger = logging.getLogger("vllm.safegene_server")


@dataclass(frozen=True)
class Seen:
    """A version, and how often the registry had lost changes until it was read."""

    version: int
    losses: int


class History:
    """For several threads: one read at a time, so that positions are compared in their order.

    `position` is the newest one read. `losses` counts how often the registry was found without it.
    """

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.position: Position | None = None
        self.losses = 0
        self._lock = threading.Lock()

    def look(self) -> Seen:
        """Read how far the registry is. Blocks. Errors: RegistryDownError."""
        with self._lock:
            return self._take(*self.registry.position(self.position))

    def snapshot(self) -> tuple[Snapshot, int]:
        """Read what replicas follow, with the losses until then. Blocks.

        Errors: RegistryDownError.
        """
        with self._lock:
            snapshot = self.registry.snapshot(self.position)
            return snapshot, self._take(snapshot.position, snapshot.lost).losses

    def _take(self, found: Position, lost: bool) -> Seen:
        if lost:
            self.losses += 1
            before = 0 if self.position is None else self.position.version
            logger.error(
                "the registry has lost changes that were seen (version %d then, %d now): it was "
                "restored from a backup, failed over to a standby that lagged, or replaced; this "
                "server is not ready until it serves what the registry says now",
                before,
                found.version,
            )
        self.position = found
        return Seen(found.version, self.losses)
