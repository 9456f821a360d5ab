"""Aliases in one engine: tenant name to the loaded revision that serves it.

Loads and unloads nothing. For one replica, under its lock.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from safegene_server.registry import Identity, Revision, Snapshot


class Aliases:
    """Alias table over `held`, the revisions that the engine has loaded."""

    def __init__(self, held: Mapping[Identity, Revision]) -> None:
        self.held = held
        self._targets: dict[str, Identity] = {}
        self._before: dict[str, Identity] = {}

    def targets(self) -> set[Identity]:
        """Return the revisions that an alias points to."""
        return set(self._targets.values())

    def serving(self) -> dict[str, str]:
        """Map each tenant to the revision that serves it here, `tenant@N`."""
        return {tenant: one.name for tenant, one in self._targets.items()}

    def served(self) -> list[tuple[str, Revision]]:
        """Tenants and the revisions that serve them here, oldest revision first."""
        return sorted(
            ((tenant, self.held[one]) for tenant, one in self._targets.items()),
            key=lambda pair: pair[1].id,
        )

    def withdraw(
        self, wanted: Iterable[Revision], known: Collection[Identity] | None
    ) -> set[Identity]:
        """Remove aliases of other content under the id or the name of a wanted revision.

        With `known`, also those of revisions that are not in it. Returns what they pointed to.
        """
        right = {revision.identity for revision in wanted}
        ids, names = {one.id for one in right}, {one.name for one in right}
        removed = {
            tenant: one
            for tenant, one in self._targets.items()
            if (one not in right and (one.id in ids or one.name in names))
            or (known is not None and one not in known)
        }
        for tenant in removed:
            del self._targets[tenant]
        return set(removed.values())

    def switch(
        self, snapshot: Snapshot, wanted: Collection[Revision]
    ) -> tuple[bool, set[Identity]]:
        """Point aliases to every wanted revision that is loaded.

        Those of tenants that are not published are removed; the others stay. Returns whether any
        alias differs from the last switch, and the revisions that no alias pointed to then.
        """
        published = {revision.tenant for revision in wanted}
        for revision in wanted:
            if revision.identity in self.held:
                self._targets[revision.tenant] = revision.identity
        names = {tenant.name for tenant in snapshot.tenants} & published
        for tenant in self._targets.keys() - names:
            del self._targets[tenant]
        before, self._before = self._before, dict(self._targets)
        return before != self._before, self.targets() - set(before.values())
