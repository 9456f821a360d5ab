"""What is known of keys and tenants: one frozen view, replaced as a whole.

For whoever follows the registry to build, and for the middleware to read. A request reads one view,
so it never sees half a change. Not a store: nothing here is written to disk.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType

from safegene_vllm.errors import ConfigError

SCOPES = frozenset({"serve", "read", "admin"})
EVERY_TENANT = "*"
TENANT_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}(/[a-z0-9][a-z0-9._-]{0,62})?")
REVISION_NAME = re.compile(rf"({TENANT_NAME.pattern})@[1-9][0-9]*")
DIGEST_BYTES = 32


@dataclass(frozen=True)
class Limits:
    """What one tenant may take, in each API process; None is unlimited."""

    concurrent: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


UNLIMITED = Limits()


@dataclass(frozen=True)
class Tenant:
    """One tenant's names: its alias leads to `served`; `also` are older revisions still allowed.

    `served` is None while nothing is published. `created` is Unix time in seconds.
    """

    name: str
    served: str | None
    also: frozenset[str] = frozenset()
    limits: Limits = UNLIMITED
    created: int = 0


@dataclass(frozen=True)
class Principal:
    """Whom a key speaks for. `tenants` holds names, or `*`; `base` grants the base model itself.

    `expires_at` is Unix time in seconds.
    """

    name: str
    scopes: frozenset[str]
    tenants: frozenset[str] = frozenset()
    default_tenant: str | None = None
    expires_at: float | None = None
    base: bool = False

    @property
    def whole_server(self) -> bool:
        return EVERY_TENANT in self.tenants

    def may_use(self, tenant: str) -> bool:
        return tenant in self.tenants or EVERY_TENANT in self.tenants


@dataclass(frozen=True)
class View:
    """Everything at one moment; make it with `make_view`. `keys` is keyed by `key_digest`.

    `base_models` are the names under which the engine serves its base model; they come before a
    tenant of the same name, so that such a tenant is not served rather than the base in its place.
    """

    keys: Mapping[bytes, Principal] = field(default_factory=dict)
    tenants: Mapping[str, Tenant] = field(default_factory=dict)
    base_models: tuple[str, ...] = ()
    base_limits: Limits = UNLIMITED


class Catalog:
    """Holds the current view. An empty one, as at the start, lets nobody in."""

    def __init__(self, view: View | None = None) -> None:
        self.view = view or View()

    def replace(self, view: View) -> None:
        """From now on; requests under way keep the view they began with."""
        self.view = view


def key_digest(secret: str | bytes) -> bytes:
    """How a key is looked up: SHA-256, so the time of the search tells nothing about the key."""
    return hashlib.sha256(secret.encode() if isinstance(secret, str) else secret).digest()


def make_view(
    *,
    keys: Mapping[bytes, Principal],
    tenants: Iterable[Tenant],
    base_models: Iterable[str] = (),
    base_limits: Limits = UNLIMITED,
) -> View:
    """A checked copy that nobody else can change. Errors: ConfigError with every fault."""
    listed = tuple(tenants)
    faults = [
        *(fault for digest, key in keys.items() for fault in _key_faults(digest, key)),
        *(fault for tenant in listed for fault in _tenant_faults(tenant)),
        *_limit_faults("the base model", base_limits),
    ]
    by_name = {tenant.name: tenant for tenant in listed}
    if len(by_name) < len(listed):
        twice = sorted({t.name for t in listed if t is not by_name[t.name]})
        faults.append(f"tenants named more than once: {twice}; every name is one tenant")
    if faults:
        raise ConfigError("the view of keys and tenants is not usable: " + "; ".join(faults) + ".")
    return View(
        MappingProxyType(dict(keys)), MappingProxyType(by_name), tuple(base_models), base_limits
    )


def _key_faults(digest: bytes, key: Principal) -> list[str]:
    faults = []
    if not isinstance(digest, bytes) or len(digest) != DIGEST_BYTES:
        faults.append(f"key {key.name!r}: its digest is not {DIGEST_BYTES} bytes of SHA-256")
    if key.scopes - SCOPES:
        unknown, known = sorted(key.scopes - SCOPES), sorted(SCOPES)
        faults.append(f"key {key.name!r}: unknown scopes {unknown}, expected some of {known}")
    if key.default_tenant is not None and not key.may_use(key.default_tenant):
        faults.append(
            f"key {key.name!r}: its default tenant {key.default_tenant!r} is not one it may use"
        )
    return faults


def _tenant_faults(tenant: Tenant) -> list[str]:
    faults = _limit_faults(f"tenant {tenant.name!r}", tenant.limits)
    if not TENANT_NAME.fullmatch(tenant.name):
        faults.append(f"{tenant.name!r} is not a tenant name ({TENANT_NAME.pattern})")
    for revision in sorted(tenant.also | ({tenant.served} if tenant.served else set())):
        match = REVISION_NAME.fullmatch(revision)
        if match is None or match[1] != tenant.name:
            faults.append(f"tenant {tenant.name!r}: {revision!r} is not {tenant.name}@N")
    return faults


def _limit_faults(whose: str, limits: Limits) -> list[str]:
    return [
        f"{whose}: {limit.name} is {value!r}, expected a positive integer or none"
        for limit in fields(limits)
        if (value := getattr(limits, limit.name)) is not None
        and (isinstance(value, bool) or not isinstance(value, int) or value < 1)
    ]
