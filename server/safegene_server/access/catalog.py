"""In-memory catalog of keys and tenants: one frozen view, replaced as a whole.

The replica builds it from the registry, the middleware reads it. A request reads one view, so it
never sees half a change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType

from safegene_server.tenant_names import is_revision_name, tenant_name_error
from safegene_vllm.errors import ConfigError

SCOPES = frozenset({"serve", "read", "admin"})
EVERY_TENANT = "*"
DIGEST_BYTES = 32


@dataclass(frozen=True)
class Limits:
    """Limits of one tenant in each API process; None is unlimited."""

    concurrent: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


UNLIMITED = Limits()


@dataclass(frozen=True)
class Tenant:
    """Names of one tenant: its alias leads to `served`; `also` are older revisions still allowed.

    `served` is None while nothing is published. `created` is Unix time in seconds.
    """

    name: str
    served: str | None
    also: frozenset[str] = frozenset()
    limits: Limits = UNLIMITED
    created: int = 0


@dataclass(frozen=True)
class Principal:
    """Identity and permissions of a key.

    `tenants` holds names, or `*`; `base` grants the base model itself. `expires_at` is Unix
    time in seconds.
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
        """Return whether the key is for this tenant."""
        return tenant in self.tenants or EVERY_TENANT in self.tenants


@dataclass(frozen=True)
class View:
    """Keys and tenants at one time; make it with `make_view`. `keys` is keyed by `key_digest`.

    `base_models` are the served names of the base model. They take precedence over a tenant of the
    same name, which then is not served, so that the base is never served in a tenant's place.
    `max_model_len` is the engine's context in tokens.
    """

    keys: Mapping[bytes, Principal] = field(default_factory=dict)
    tenants: Mapping[str, Tenant] = field(default_factory=dict)
    base_models: tuple[str, ...] = ()
    base_limits: Limits = UNLIMITED
    max_model_len: int | None = None


class Catalog:
    """Holder of the current view. The initial empty view rejects every key."""

    def __init__(self, view: View | None = None) -> None:
        self.view = view or View()

    def replace(self, view: View) -> None:
        """Use another view for new requests; those in flight keep the one they started with."""
        self.view = view


def key_digest(secret: str | bytes) -> bytes:
    """Return the SHA-256 of a key: looked up by it, a key is not revealed by timing."""
    return hashlib.sha256(secret.encode() if isinstance(secret, str) else secret).digest()


def make_view(
    *,
    keys: Mapping[bytes, Principal],
    tenants: Iterable[Tenant],
    base_models: Iterable[str] = (),
    base_limits: Limits = UNLIMITED,
    max_model_len: int | None = None,
) -> View:
    """Make a checked, immutable view. Errors: ConfigError with every problem."""
    listed = tuple(tenants)
    problems = [
        *(problem for digest, key in keys.items() for problem in _key_problems(digest, key)),
        *(problem for tenant in listed for problem in _tenant_problems(tenant)),
        *_limit_problems("the base model", base_limits),
    ]
    by_name = {tenant.name: tenant for tenant in listed}
    if len(by_name) < len(listed):
        duplicates = sorted({t.name for t in listed if t is not by_name[t.name]})
        problems.append(f"tenants named more than once: {duplicates}; every name is one tenant")
    if problems:
        raise ConfigError(
            "the view of keys and tenants is not usable: " + "; ".join(problems) + "."
        )
    return View(
        MappingProxyType(dict(keys)),
        MappingProxyType(by_name),
        tuple(base_models),
        base_limits,
        max_model_len,
    )


def _key_problems(digest: bytes, key: Principal) -> list[str]:
    problems = []
    if not isinstance(digest, bytes) or len(digest) != DIGEST_BYTES:
        problems.append(f"key {key.name!r}: its digest is not {DIGEST_BYTES} bytes of SHA-256")
    if key.scopes - SCOPES:
        unknown, known = sorted(key.scopes - SCOPES), sorted(SCOPES)
        problems.append(f"key {key.name!r}: unknown scopes {unknown}, expected some of {known}")
    if key.default_tenant is not None and not key.may_use(key.default_tenant):
        problems.append(
            f"key {key.name!r}: its default tenant {key.default_tenant!r} is not one it may use"
        )
    return problems


def _tenant_problems(tenant: Tenant) -> list[str]:
    problems = _limit_problems(f"tenant {tenant.name!r}", tenant.limits)
    if error := tenant_name_error(tenant.name):
        problems.append(error)
    for revision in sorted(tenant.also | ({tenant.served} if tenant.served else set())):
        if not is_revision_name(revision, tenant.name):
            problems.append(f"tenant {tenant.name!r}: {revision!r} is not {tenant.name}@N")
    return problems


def _limit_problems(whose: str, limits: Limits) -> list[str]:
    return [
        f"{whose}: {limit.name} is {value!r}, expected a positive integer or none"
        for limit in fields(limits)
        if (value := getattr(limits, limit.name)) is not None
        and (isinstance(value, bool) or not isinstance(value, int) or value < 1)
    ]
