"""Retention of revisions in an engine: which stay loaded, and which are unloaded once unused.

A canceled request ends here slightly before the engine aborts it, so a revision is unloaded only
after QUIET_S without requests. For one replica, under its lock.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from safegene_server.access.limits import Counters
from safegene_server.registry import Identity, Revision
from safegene_server.replica.aliases import Aliases
from safegene_server.replica.loaded_revisions import LoadedRevisions

RESTORED = (
    "the registry has lost changes that this server has seen, or has other content under an id (it "
    "was restored, or failed over to a standby that lagged): its current state is not applied yet"
)
QUIET_S = 0.2


class Retention:
    """Retained revisions.

    `warm` (published, or the target of a rollback), `under_test` (loaded until `unload`), and the
    targets of aliases.
    """

    def __init__(self, loaded: LoadedRevisions, aliases: Aliases, counters: Counters) -> None:
        self.loaded, self.aliases, self.counters = loaded, aliases, counters
        self.warm: set[Identity] = set()
        self.under_test: set[Identity] = set()
        self._in_use: Counter[str] = Counter()

    def unused(self, held: Iterable[Identity]) -> list[Identity]:
        """Return the revisions that need not stay and have no requests in flight."""
        wanted = self.warm | self.under_test | self.aliases.targets()
        return [one for one in held if one not in wanted and not self._is_busy(one.name)]

    async def remove(self, held: Iterable[Identity]) -> bool:
        """Unload the unused ones; True if there were any. Errors: as `LoadedRevisions.remove`."""
        unused = [one for one in self.unused(held) if one in self.loaded.revisions]
        for identity in unused:
            await self.loaded.remove(identity)
        return bool(unused)

    async def unload_conflicting(self, wanted: Iterable[Revision]) -> set[Identity]:
        """Unload other content under the id or the name of a wanted revision.

        Returns what is in use and still conflicts. Errors: as `LoadedRevisions.remove`.
        """
        found = self.loaded.conflicting(wanted)
        if unused := self.unused(found):
            await asyncio.sleep(QUIET_S)
            await self.remove(unused)
        return set(found) & self.loaded.revisions.keys()

    @contextmanager
    def in_use(self, served: str) -> Iterator[None]:
        """Keep a revision loaded meanwhile, as a running request of a tenant does."""
        self._in_use[served] += 1
        try:
            yield
        finally:
            self._in_use[served] -= 1
            if not self._in_use[served]:
                del self._in_use[served]

    def _is_busy(self, served: str) -> bool:
        return served in self._in_use or self.counters.in_flight(served) > 0
