"""Position of this process in a registry's history, shared by its threads.

Every read is compared with the newest position read before, so that the first read after a restore
detects it.
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
    """A version, and how often the registry had lost changes before it was read."""

    version: int
    losses: int


class History:
    """Newest `position` read from a registry, and how often the registry had lost it (`losses`).

    Thread-safe: reads are made one at a time, so that positions are compared in their order.
    """

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.position: Position | None = None
        self.losses = 0
        self._lock = threading.Lock()

    def poll(self) -> Seen:
        """Read the registry's version. Blocks. Errors: RegistryDownError."""
        with self._lock:
            return self._update(*self.registry.position(self.position))

    def snapshot(self) -> tuple[Snapshot, int]:
        """Read a snapshot, and the losses so far. Blocks. Errors: RegistryDownError."""
        with self._lock:
            snapshot = self.registry.snapshot(self.position)
            return snapshot, self._update(snapshot.position, snapshot.lost).losses

    def _update(self, found: Position, lost: bool) -> Seen:
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
