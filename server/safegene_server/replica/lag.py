"""How long a replica has known of something that it does not serve: a version of the registry, or
a revision.

For one replica to note what it hears and what it has applied; safe to hear in another thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from safegene_server.registry import Identity


class Lag:
    """`known` is the newest version heard of. `clock` is in seconds and never runs backwards.

    A registry that has lost changes begins again: versions heard of before it did, with fewer
    `losses`, say nothing about it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.known = 0
        self._losses = 0
        self._waiting: list[tuple[int, float]] = []
        self._lock = threading.Lock()

    def hear(self, version: int, losses: int = 0) -> None:
        """There is this version; an older one, or one already heard of, is no news."""
        with self._lock:
            if losses > self._losses:
                self.known, self._losses, self._waiting = 0, losses, []
            if losses == self._losses and version > self.known:
                self.known = version
                self._waiting.append((version, self.clock()))

    def apply(self, version: int, losses: int = 0) -> None:
        """Everything up to this version is served."""
        with self._lock:
            if losses == self._losses:
                self._waiting = [(waits, at) for waits, at in self._waiting if waits > version]

    def heard_s(self, version: int) -> float:
        """When this version was heard of, by `clock`; now if it is served or unheard of."""
        return next((at for waits, at in self._waiting if waits == version), self.clock())

    def seconds(self) -> float:
        """Since the oldest version that is not served was heard of; 0 when level."""
        waiting = self._waiting
        return self.clock() - waiting[0][1] if waiting else 0.0


class Waiting:
    """Since when each revision has been known that is published and not offered."""

    def __init__(self) -> None:
        self._since_s: dict[Identity, float] = {}

    def expect(self, revisions: Iterable[Identity], since_s: float) -> None:
        """These wait, the others no more; for those that are new, since `since_s`."""
        self._since_s = {r: self._since_s.get(r, since_s) for r in revisions}

    def pop_s(self, revision: Identity) -> float:
        """Since when it has waited; it is offered now."""
        return self._since_s.pop(revision)
