"""Which tenants have series of their own: a bounded number, so that /metrics stays bounded too.

For whoever writes a `tenant` label. A name is given away once and kept until the process ends, so
that a series never changes its meaning.
"""

from __future__ import annotations

from safegene_server.metrics.settings import MetricsSettings

NOBODY = ""
"""The label of what belongs to no tenant, such as requests for the base model."""
OTHER = "other"
"""The label that all tenants without one of their own share. A tenant of this name is one too."""


class TenantLabels:
    """Labels of one process. Ask in the order of publishing: the first come keep their names.

    Give only names of tenants that exist: what a client merely wrote would use up the places.
    """

    def __init__(self, settings: MetricsSettings | None = None) -> None:
        given = settings or MetricsSettings()
        self._most = given.max_tenants
        self._named = dict.fromkeys(name for name in given.tenants if name not in (NOBODY, OTHER))

    def label(self, tenant: str) -> str:
        """The tenant's own name while there is a place, else "other"; "" stays ""."""
        if tenant in self._named or tenant == NOBODY:
            return tenant
        if tenant == OTHER or len(self._named) >= self._most:
            return OTHER
        self._named[tenant] = None
        return tenant

    def own(self, tenant: str) -> bool:
        """Whether gauges of this one tenant make sense: its label is its own name."""
        return tenant != NOBODY and self.label(tenant) == tenant != OTHER
