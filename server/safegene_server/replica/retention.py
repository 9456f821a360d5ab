"""Retention of revisions in an engine: which stay, and which are removed once nothing uses them.

A canceled request has ended here a moment before the engine gets to drop it, so a revision is
removed only after QUIET_S without any. For one replica, under its lock.
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

QUIET_S = 0.2


class Retention:
    """`warm` is published or would be rolled back to, `tried` is loaded until its trial is over;
    what an alias leads to stays as well."""

    def __init__(self, holding: LoadedRevisions, aliases: Aliases, counters: Counters) -> None:
        self.holding, self.aliases, self.counters = holding, aliases, counters
        self.warm: set[Identity] = set()
        self.tried: set[Identity] = set()
        self._kept: Counter[str] = Counter()

    def unused(self, held: Iterable[Identity]) -> list[Identity]:
        """Filter out what is to stay and what has requests in flight."""
        wanted = self.warm | self.tried | self.aliases.targets()
        return [one for one in held if one not in wanted and not self._is_busy(one.name)]

    async def remove(self, held: Iterable[Identity]) -> bool:
        """Remove those that are unused; whether there were any. Errors: as `Holding.remove`."""
        gone = [one for one in self.unused(held) if one in self.holding.revisions]
        for identity in gone:
            await self.holding.remove(identity)
        return bool(gone)

    async def make_room(self, wanted: Iterable[Revision]) -> set[Identity]:
        """Remove other content that is held under the id or the name of a wanted revision. Returns
        what is still in the way, since it is in use. Errors: as `Holding.remove`."""
        found = self.holding.in_the_way(wanted)
        if unused := self.unused(found):
            await asyncio.sleep(QUIET_S)
            await self.remove(unused)
        return set(found) & self.holding.revisions.keys()

    @contextmanager
    def keeping(self, served: str) -> Iterator[None]:
        """Keep a held revision meanwhile, as a tenant's request does while it runs."""
        self._kept[served] += 1
        try:
            yield
        finally:
            self._kept[served] -= 1
            if not self._kept[served]:
                del self._kept[served]

    def _is_busy(self, served: str) -> bool:
        return served in self._kept or self.counters.in_flight(served) > 0
