"""Values of the `tenant` label: a bounded number of tenants have series of their own.

A label is assigned once and stays until the process ends, so a series never changes its meaning.
"""

from __future__ import annotations

from safegene_server.metrics.settings import MetricsSettings

NO_TENANT = ""
"""Label of what belongs to no tenant, such as requests for the base model."""
OTHER = "other"
"""Label shared by all tenants without one of their own, and by a tenant of this name."""


class TenantLabels:
    """Labels of one process, assigned first come, first served, in the order of publishing.

    Pass only names of existing tenants: names that a client made up would use up the labels.
    """

    def __init__(self, settings: MetricsSettings | None = None) -> None:
        given = settings or MetricsSettings()
        self._max = given.max_tenants
        self._named = dict.fromkeys(
            name for name in given.tenants if name not in (NO_TENANT, OTHER)
        )

    def label(self, tenant: str) -> str:
        """Return the tenant's own name while labels are left, else "other"; "" stays ""."""
        if tenant in self._named or tenant == NO_TENANT:
            return tenant
        if tenant == OTHER or len(self._named) >= self._max:
            return OTHER
        self._named[tenant] = None
        return tenant

    def has_own(self, tenant: str) -> bool:
        """Return whether the tenant's label is its own name, so that it may have gauges."""
        return tenant != NO_TENANT and self.label(tenant) == tenant != OTHER
