"""How long a replica has known of a version of the registry that it does not serve.

For one replica to note what it hears and what it has applied; safe to hear in another thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class Lag:
    """`known` is the newest version heard of. `clock` is in seconds and never runs backwards."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.known = 0
        self._waiting: list[tuple[int, float]] = []

    def hear(self, version: int) -> None:
        """There is this version; an older one, or one already heard of, is no news."""
        if version > self.known:
            self.known = version
            self._waiting.append((version, self.clock()))

    def apply(self, version: int) -> None:
        """Everything up to this version is served."""
        self._waiting = [(waits, at) for waits, at in self._waiting if waits > version]

    def seconds(self) -> float:
        """Since the oldest version that is not served was heard of; 0 when level."""
        waiting = self._waiting
        return self.clock() - waiting[0][1] if waiting else 0.0
