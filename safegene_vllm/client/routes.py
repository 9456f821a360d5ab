"""The API's routes as functions: each returns a Call, which Client and AsyncClient carry out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import quote

from safegene_vllm.client.schemas import (
    AuditEntry,
    Family,
    Floored,
    Job,
    JobState,
    Key,
    NewKey,
    Onboarding,
    Page,
    Probe,
    Replica,
    Retired,
    Revision,
    Rollout,
    Schema,
    Switched,
    Tenant,
    Usage,
    Whoami,
)
from safegene_vllm.errors import ConfigError

T = TypeVar("T")
_S = TypeVar("_S", bound=Schema)


@dataclass(frozen=True)
class Call(Generic[T]):
    """A request and the type of its result; None values of `query` and `body` are left out.

    `paged`: the result is the list of all pages' items, each an `item`; else `item` is its type.
    """

    item: Any
    method: str
    path: str
    query: Mapping[str, str | int | None] = field(default_factory=dict)
    body: Mapping[str, Any] | None = None
    paged: bool = False


def whoami() -> Call[Whoami]:
    """Return name, scopes and tenants of this key."""
    return Call(Whoami, "GET", "/whoami")


def ready() -> Call[dict[str, Any]]:
    """Return what the responding replica serves; ApiError 503 unless all is as published."""
    return Call(dict[str, Any], "GET", "/ready")


def receipts() -> Call[dict[str, Any]]:
    """Return what each of the replica's ranks has applied, and the errors found."""
    return Call(dict[str, Any], "GET", "/receipts")


# Tenants


def tenants() -> Call[list[Tenant]]:
    return _listed(Tenant, "/tenants")


def tenant(name: str) -> Call[Tenant]:
    return _tenant(Tenant, "GET", name)


def add_tenant(
    name: str,
    *,
    source: str | None = None,
    profile: Mapping[str, Any] | None = None,
    coefficients: Sequence[float] | float | None = None,
    layers: Mapping[int, float] | None = None,
    calibrate: Mapping[str, Any] | None = None,
    limits: Mapping[str, int] | None = None,
    publish: bool | None = None,
) -> Call[Onboarding]:
    """Add a tenant and start the job that onboards it; `source` is as the server sees it.

    Coefficients as for change_profile; without any, the safegene.json of the source is used,
    or with `calibrate` (`examples`, optional `data`, `seed` and `evaluations`, as for
    calibrate) the job finds them first. `publish=False` stops once the revision is ready.
    """
    change = change_body(profile=profile, coefficients=coefficients, layers=layers)
    which = {"name": name, "source": source, "calibrate": calibrate}
    body = {**which, "limits": limits, "publish": publish, **change}
    return Call(Onboarding, "POST", "/tenants", body=body)


def retire_tenant(name: str, *, expected_revision: int | None = None) -> Call[Retired]:
    """Stop serving a tenant; its history stays."""
    query = {"expected_revision": expected_revision}
    path = f"/tenants/{tenant_path(name)}"
    return Call(Retired, "DELETE", path, query=query)


def revisions(name: str) -> Call[list[Revision]]:
    return _listed(Revision, f"/tenants/{tenant_path(name)}/revisions")


def add_revision(
    name: str,
    *,
    source: str | None = None,
    profile: Mapping[str, Any] | None = None,
    coefficients: Sequence[float] | float | None = None,
    layers: Mapping[int, float] | None = None,
    calibrate: Mapping[str, Any] | None = None,
    publish: bool | None = None,
    expected_revision: int | None = None,
) -> Call[Onboarding]:
    """Start the job that onboards new content of a tenant; source None: read its own again.

    Coefficients and `calibrate` as for add_tenant.
    """
    change = change_body(profile=profile, coefficients=coefficients, layers=layers)
    which = {"source": source, "publish": publish, "expected_revision": expected_revision}
    body = {**which, "calibrate": calibrate, **change}
    return _tenant(Onboarding, "POST", name, "/revisions", body)


def change_profile(
    name: str,
    *,
    profile: Mapping[str, Any] | None = None,
    coefficients: Sequence[float] | float | None = None,
    layers: Mapping[int, float] | None = None,
    scale: float | None = None,
    expected_revision: int | None = None,
) -> Call[Switched]:
    """Switched the coefficients for the same weights, live on return. Give one of the four.

    `profile` is the content of a safegene.json; `coefficients` one number per layer, or one
    for every layer with a vector; `layers` changes the named ones; `scale` multiplies those
    served now.
    """
    change = change_body(profile=profile, coefficients=coefficients, layers=layers, scale=scale)
    body = {"expected_revision": expected_revision, **change}
    return _tenant(Switched, "PATCH", name, "/profile", body)


def publish(name: str, number: int, *, expected_revision: int | None = None) -> Call[Switched]:
    """Publish a revision that is ready, or was served before."""
    body = {"number": number, "expected_revision": expected_revision}
    return _tenant(Switched, "POST", name, "/publish", body)


def rollback(
    name: str, number: int | None = None, *, expected_revision: int | None = None
) -> Call[Switched]:
    """Publish revision `number` again (None: the one before the published one)."""
    body = {"number": number, "expected_revision": expected_revision}
    return _tenant(Switched, "POST", name, "/rollback", body)


def freeze_tenant(name: str) -> Call[Tenant]:
    """Reject every change of the tenant's content until it is unfrozen."""
    return _tenant(Tenant, "POST", name, "/freeze", {})


def unfreeze_tenant(name: str) -> Call[Tenant]:
    return _tenant(Tenant, "POST", name, "/unfreeze", {})


def set_limits(name: str, limits: Mapping[str, int]) -> Call[Tenant]:
    """Set all limits of a tenant; those not named are lifted."""
    return _tenant(Tenant, "PUT", name, "/limits", dict(limits))


def calibrate(
    name: str,
    examples: Mapping[str, Sequence[Mapping[str, str | None]]],
    *,
    data: Mapping[str, Any] | None = None,
    seed: int = 0,
    evaluations: int | None = None,
    publish: bool | None = None,
    expected_revision: int | None = None,
) -> Call[Onboarding]:
    """Start a job that calibrates the tenant's coefficients on the server's own engine.

    `examples` has `safety`, `task` and optionally `benign`: objects with `prompt` and `answer`
    (None: chosen by the server). `data` is their provenance for the calibration record.
    `evaluations` is the maximum number of candidates (None: the server's default). `publish`
    as for add_tenant.
    """
    given = {kind: [dict(row) for row in rows] for kind, rows in examples.items()}
    how = {"data": data, "seed": seed, "evaluations": evaluations, "publish": publish}
    body = {"examples": given, **how, "expected_revision": expected_revision}
    return _tenant(Onboarding, "POST", name, "/calibrate", body)


def probes() -> Call[list[Probe]]:
    """List each tenant's last probe by the responding replica."""
    return _listed(Probe, "/probes")


def probe(name: str) -> Call[Onboarding]:
    """Start a job that probes what the tenant serves now."""
    return _tenant(Onboarding, "POST", name, "/probe", {})


# Families


def families() -> Call[list[Family]]:
    return _listed(Family, "/families")


def family(digest: str) -> Call[Family]:
    return _family(Family, "GET", digest)


def set_floor(digest: str, floor: Mapping[int, float]) -> Call[Floored]:
    """Set the minimum coefficient of each named layer, for every tenant of the family."""
    body = {"floor": {str(layer): minimum for layer, minimum in floor.items()}}
    return _family(Floored, "PUT", digest, "/floor", body)


def freeze_family(digest: str) -> Call[Family]:
    """Reject every change of every tenant of the family until it is unfrozen."""
    return _family(Family, "POST", digest, "/freeze", {})


def unfreeze_family(digest: str) -> Call[Family]:
    return _family(Family, "POST", digest, "/unfreeze", {})


# Keys


def keys() -> Call[list[Key]]:
    return _listed(Key, "/keys")


def add_key(
    name: str,
    *,
    scopes: Sequence[str],
    tenants: Sequence[str],
    default_tenant: str | None = None,
    expires_at: str | None = None,
) -> Call[NewKey]:
    """Create a key; `secret` is in this response only.

    `expires_at` is ISO 8601 with a zone; `scopes` are among serve, read and admin; `tenants`
    are names, `base` or `*`.
    """
    body = {
        "name": name,
        "scopes": list(scopes),
        "tenants": list(tenants),
        "default_tenant": default_tenant,
        "expires_at": expires_at,
    }
    return Call(NewKey, "POST", "/keys", body=body)


def rotate_key(name: str) -> Call[NewKey]:
    """Replace a key's secret, which is in this response only; the old one stops working."""
    path = f"/keys/{part_of_path(name)}/rotate"
    return Call(NewKey, "POST", path, body={})


def revoke_key(name: str) -> Call[Key]:
    return Call(Key, "DELETE", f"/keys/{part_of_path(name)}")


# Rollouts, replicas, audit


def rollouts(*, limit: int | None = None) -> Call[list[Rollout]]:
    """List rollouts, newest first."""
    return _listed(Rollout, "/rollouts", {"limit": limit})


def rollout(id: int) -> Call[Rollout]:
    return Call(Rollout, "GET", f"/rollouts/{id}")


def replicas() -> Call[list[Replica]]:
    return _listed(Replica, "/replicas")


def audit(
    *,
    actor: str | None = None,
    action: str | None = None,
    target: str | None = None,
    since: str | None = None,
    until: str | None = None,
    limit: int | None = None,
    cursor: int | str | None = None,
) -> Call[Page[AuditEntry]]:
    """Return a page of the audit log, newest first; its `cursor` requests the next one."""
    query = {
        "actor": actor,
        "action": action,
        "target": target,
        "since": since,
        "until": until,
        "limit": limit,
        "cursor": cursor,
    }
    return Call(Page[AuditEntry], "GET", "/audit", query=query)


def usage(
    *,
    since: str | None = None,
    until: str | None = None,
    tenant: str | None = None,
    key: str | None = None,
) -> Call[list[Usage]]:
    """List usage by day, tenant and key, newest day first; days as `2031-05-01`, both included."""
    query = {"since": since, "until": until, "tenant": tenant, "key": key}
    return _listed(Usage, "/usage", query)


# Jobs


def jobs(
    *,
    tenant: str | None = None,
    state: JobState | None = None,
    limit: int | None = None,
) -> Call[list[Job]]:
    """List jobs, newest first."""
    query = {"tenant": tenant, "state": state, "limit": limit}
    return _listed(Job, "/jobs", query)


def job(id: int) -> Call[Job]:
    return Call(Job, "GET", f"/jobs/{id}")


def cancel_job(id: int) -> Call[Job]:
    """Cancel a job; it stops between two of its steps."""
    return Call(Job, "POST", f"/jobs/{id}/cancel", body={})


def tenant_path(name: str) -> str:
    """Quote a tenant's name, which may contain slashes, for a path. Errors: ConfigError."""
    return "/".join(part_of_path(part, name) for part in name.split("/"))


def part_of_path(name: str, whole: str | None = None) -> str:
    """Quote a name as one segment of a path; `.` and `..` are rejected. Errors: ConfigError."""
    if name in ("", ".", ".."):
        raise ConfigError(f"{name if whole is None else whole!r} is not a valid name")
    return quote(name, safe="")


def change_body(
    *,
    profile: Mapping[str, Any] | None = None,
    coefficients: Sequence[float] | float | None = None,
    layers: Mapping[int, float] | None = None,
    scale: float | None = None,
) -> dict[str, Any]:
    """Build the part of a request body with the coefficients."""
    many = coefficients if isinstance(coefficients, float | int | None) else list(coefficients)
    named = None if layers is None else {str(layer): value for layer, value in layers.items()}
    return {"profile": profile, "coefficients": many, "layers": named, "scale": scale}


def _listed(
    item: type[_S], path: str, query: Mapping[str, str | int | None] | None = None
) -> Call[list[_S]]:
    return Call(item, "GET", path, query or {}, paged=True)


def _family(
    item: type[_S],
    method: str,
    digest: str,
    action: str = "",
    body: Mapping[str, Any] | None = None,
) -> Call[_S]:
    return Call(item, method, f"/families/{part_of_path(digest)}{action}", body=body)


def _tenant(
    item: type[_S], method: str, name: str, action: str = "", body: Mapping[str, Any] | None = None
) -> Call[_S]:
    return Call(item, method, f"/tenants/{tenant_path(name)}{action}", body=body)
