"""Aliases in one engine: the name of every tenant, and the held revision that it leads to.

Loads and removes nothing. For one replica, under its lock.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from safegene_server.registry import Identity, Revision, Snapshot


class Aliases:
    """`held` are the revisions of the engine."""

    def __init__(self, held: Mapping[Identity, Revision]) -> None:
        self.held = held
        self._leads_to: dict[str, Identity] = {}
        self._before: dict[str, Identity] = {}

    def targets(self) -> set[Identity]:
        return set(self._leads_to.values())

    def serving(self) -> dict[str, str]:
        """Tenant to the revision that answers for it here, `tenant@N`."""
        return {tenant: one.name for tenant, one in self._leads_to.items()}

    def offered(self) -> list[tuple[str, Revision]]:
        """Tenants and the revisions that their names lead to here, the first published first."""
        return sorted(
            ((tenant, self.held[one]) for tenant, one in self._leads_to.items()),
            key=lambda pair: pair[1].id,
        )

    def withdraw(
        self, wanted: Iterable[Revision], known: Collection[Identity] | None
    ) -> set[Identity]:
        """Take away aliases of other content under the id or the name of a wanted revision and,
        with `known`, of what is not among it. Returns what they led to."""
        right = {revision.identity for revision in wanted}
        ids, names = {one.id for one in right}, {one.name for one in right}
        gone = {
            tenant: one
            for tenant, one in self._leads_to.items()
            if (one not in right and (one.id in ids or one.name in names))
            or (known is not None and one not in known)
        }
        for tenant in gone:
            del self._leads_to[tenant]
        return set(gone.values())

    def switch(
        self, snapshot: Snapshot, wanted: Collection[Revision]
    ) -> tuple[bool, set[Identity]]:
        """Switch to every wanted revision that is held; other aliases stay where they are, and
        those of tenants that are not published go. Returns whether any alias differs from those
        after the last switch, and the revisions that none led to then."""
        published = {revision.tenant for revision in wanted}
        for revision in wanted:
            if revision.identity in self.held:
                self._leads_to[revision.tenant] = revision.identity
        names = {tenant.name for tenant in snapshot.tenants} & published
        for tenant in self._leads_to.keys() - names:
            del self._leads_to[tenant]
        before, self._before = self._before, dict(self._leads_to)
        return before != self._before, self.targets() - set(before.values())
