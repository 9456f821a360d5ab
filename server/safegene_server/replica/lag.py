"""Replication lag: how long a registry version or a revision has been known and not served.

For one replica; `observe` may be called in another thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from safegene_server.registry import Identity


class Lag:
    """Lag of one replica; `known` is the newest version observed, `clock` is monotonic, in seconds.

    A registry that has lost changes starts over: versions observed with fewer `losses` no longer
    count.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.known = 0
        self._losses = 0
        self._waiting: list[tuple[int, float]] = []
        self._lock = threading.Lock()

    def observe(self, version: int, losses: int = 0) -> None:
        """Record a version of the registry; an older or already known one changes nothing."""
        with self._lock:
            if losses > self._losses:
                self.known, self._losses, self._waiting = 0, losses, []
            if losses == self._losses and version > self.known:
                self.known = version
                self._waiting.append((version, self.clock()))

    def apply(self, version: int, losses: int = 0) -> None:
        """Record that everything up to this version is served."""
        with self._lock:
            if losses == self._losses:
                self._waiting = [(waits, at) for waits, at in self._waiting if waits > version]

    def heard_s(self, version: int) -> float:
        """Time when this version was first observed, by `clock`; now if it is served or unknown."""
        return next((at for waits, at in self._waiting if waits == version), self.clock())

    def seconds(self) -> float:
        """Seconds since the oldest version that is not served was observed; 0 if up to date."""
        waiting = self._waiting
        return self.clock() - waiting[0][1] if waiting else 0.0


class Waiting:
    """Start of the wait of each revision that is published but not served yet."""

    def __init__(self) -> None:
        self._since_s: dict[Identity, float] = {}

    def expect(self, revisions: Iterable[Identity], since_s: float) -> None:
        """Replace the waiting revisions; new ones wait since `since_s`."""
        self._since_s = {r: self._since_s.get(r, since_s) for r in revisions}

    def pop_s(self, revision: Identity) -> float:
        """End the wait of a revision, and return when it began."""
        return self._since_s.pop(revision)
