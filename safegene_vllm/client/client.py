"""`Client`: a method for every administrative route of a server.

Responses are the server's own objects (see types); errors are ApiError. Waiting for a job or
rollout survives a restart of the server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, cast

import httpx

from safegene_vllm.client.connection import (
    ATTEMPTS,
    FIRST_PAUSE_S,
    TIMEOUT_S,
    Connection,
    part_of_path,
    tenant_path,
)
from safegene_vllm.client.polling import PATIENCE_S, POLL_S, poll_until_done
from safegene_vllm.client.types import (
    ENDED,
    AuditPage,
    Change,
    Family,
    Floored,
    Job,
    JobState,
    Key,
    Probe,
    Replica,
    Retired,
    Revision,
    Rollout,
    Started,
    Tenant,
    Whoami,
    change_body,
)


class Client:
    """Client of a server at `base_url` (with or without /v1). Close it, or use `with`.

    Errors of every method: ApiError; ConfigError for arguments that cannot be sent.
    """

    def __init__(
        self,
        base_url: str,
        key: str | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        attempts: int = ATTEMPTS,
        first_pause_s: float = FIRST_PAUSE_S,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._server = Connection(
            base_url,
            key,
            timeout_s=timeout_s,
            attempts=attempts,
            first_pause_s=first_pause_s,
            transport=transport,
        )

    def close(self) -> None:
        self._server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self._server.url!r})"

    def whoami(self) -> Whoami:
        """Return name, scopes and tenants of this key."""
        return cast(Whoami, self._server.request("GET", "/whoami"))

    def ready(self) -> dict[str, Any]:
        """Return what the responding replica serves; ApiError 503 unless all is as published."""
        return self._server.request("GET", "/ready")

    def receipts(self) -> dict[str, Any]:
        """Return what each of the replica's ranks has applied, and the errors found."""
        return self._server.request("GET", "/receipts")

    # Tenants

    def tenants(self) -> list[Tenant]:
        return cast(list[Tenant], list(self._server.listed("/tenants")))

    def tenant(self, name: str) -> Tenant:
        return cast(Tenant, self._tenant("GET", name))

    def add_tenant(
        self,
        name: str,
        *,
        source: str | None = None,
        profile: Mapping[str, Any] | None = None,
        coefficients: Sequence[float] | float | None = None,
        layers: Mapping[int, float] | None = None,
        calibrate: Mapping[str, Any] | None = None,
        limits: Mapping[str, int] | None = None,
        publish: bool | None = None,
    ) -> Started:
        """Add a tenant and start the job that onboards it; `source` is as the server sees it.

        Coefficients as for change_profile; without any, the safegene.json of the source is used,
        or with `calibrate` (`examples`, optional `data`, `seed` and `evaluations`, as for
        calibrate) the job finds them first. `publish=False` stops once the revision is ready.
        """
        change = change_body(profile=profile, coefficients=coefficients, layers=layers)
        which = {"name": name, "source": source, "calibrate": calibrate}
        body = {**which, "limits": limits, "publish": publish, **change}
        return cast(Started, self._server.request("POST", "/tenants", body=body))

    def retire_tenant(self, name: str, *, expected_revision: int | None = None) -> Retired:
        """Stop serving a tenant; its history stays."""
        query = {"expected_revision": expected_revision}
        path = f"/tenants/{tenant_path(name)}"
        return cast(Retired, self._server.request("DELETE", path, query=query))

    def revisions(self, name: str) -> list[Revision]:
        found = self._server.listed(f"/tenants/{tenant_path(name)}/revisions")
        return cast(list[Revision], list(found))

    def add_revision(
        self,
        name: str,
        *,
        source: str | None = None,
        profile: Mapping[str, Any] | None = None,
        coefficients: Sequence[float] | float | None = None,
        layers: Mapping[int, float] | None = None,
        calibrate: Mapping[str, Any] | None = None,
        publish: bool | None = None,
        expected_revision: int | None = None,
    ) -> Started:
        """Start the job that onboards new content of a tenant; source None: read its own again.

        Coefficients and `calibrate` as for add_tenant.
        """
        change = change_body(profile=profile, coefficients=coefficients, layers=layers)
        which = {"source": source, "publish": publish, "expected_revision": expected_revision}
        body = {**which, "calibrate": calibrate, **change}
        return cast(Started, self._tenant("POST", name, "/revisions", body))

    def change_profile(
        self,
        name: str,
        *,
        profile: Mapping[str, Any] | None = None,
        coefficients: Sequence[float] | float | None = None,
        layers: Mapping[int, float] | None = None,
        scale: float | None = None,
        expected_revision: int | None = None,
    ) -> Change:
        """Change the coefficients for the same weights, live on return. Give one of the four.

        `profile` is the content of a safegene.json; `coefficients` one number per layer, or one
        for every layer with a vector; `layers` changes the named ones; `scale` multiplies those
        served now.
        """
        change = change_body(profile=profile, coefficients=coefficients, layers=layers, scale=scale)
        body = {"expected_revision": expected_revision, **change}
        return cast(Change, self._tenant("PATCH", name, "/profile", body))

    def publish(self, name: str, number: int, *, expected_revision: int | None = None) -> Change:
        """Publish a revision that is ready, or was served before."""
        body = {"number": number, "expected_revision": expected_revision}
        return cast(Change, self._tenant("POST", name, "/publish", body))

    def rollback(
        self, name: str, number: int | None = None, *, expected_revision: int | None = None
    ) -> Change:
        """Publish revision `number` again (None: the one before the published one)."""
        body = {"number": number, "expected_revision": expected_revision}
        return cast(Change, self._tenant("POST", name, "/rollback", body))

    def freeze_tenant(self, name: str) -> Tenant:
        """Reject every change of the tenant's content until it is unfrozen."""
        return cast(Tenant, self._tenant("POST", name, "/freeze", {}))

    def unfreeze_tenant(self, name: str) -> Tenant:
        return cast(Tenant, self._tenant("POST", name, "/unfreeze", {}))

    def set_limits(self, name: str, limits: Mapping[str, int]) -> Tenant:
        """Set all limits of a tenant; those not named are lifted."""
        return cast(Tenant, self._tenant("PUT", name, "/limits", dict(limits)))

    def calibrate(
        self,
        name: str,
        examples: Mapping[str, Sequence[Mapping[str, str | None]]],
        *,
        data: Mapping[str, Any] | None = None,
        seed: int = 0,
        evaluations: int | None = None,
        publish: bool | None = None,
        expected_revision: int | None = None,
    ) -> Started:
        """Start a job that calibrates the tenant's coefficients on the server's own engine.

        `examples` has `safety`, `task` and optionally `benign`: objects with `prompt` and `answer`
        (None: chosen by the server). `data` is their provenance for the calibration record.
        `evaluations` is the maximum number of candidates (None: the server's default). `publish`
        as for add_tenant.
        """
        given = {kind: [dict(row) for row in rows] for kind, rows in examples.items()}
        how = {"data": data, "seed": seed, "evaluations": evaluations, "publish": publish}
        body = {"examples": given, **how, "expected_revision": expected_revision}
        return cast(Started, self._tenant("POST", name, "/calibrate", body))

    def probes(self) -> list[Probe]:
        """List each tenant's last probe by the responding replica."""
        return cast(list[Probe], list(self._server.listed("/probes")))

    def probe(self, name: str) -> Started:
        """Start a job that probes what the tenant serves now."""
        return cast(Started, self._tenant("POST", name, "/probe", {}))

    # Families

    def families(self) -> list[Family]:
        return cast(list[Family], list(self._server.listed("/families")))

    def family(self, digest: str) -> Family:
        return cast(Family, self._family("GET", digest))

    def set_floor(self, digest: str, floor: Mapping[int, float]) -> Floored:
        """Set the minimum coefficient of each named layer, for every tenant of the family."""
        body = {"floor": {str(layer): minimum for layer, minimum in floor.items()}}
        return cast(Floored, self._family("PUT", digest, "/floor", body))

    def freeze_family(self, digest: str) -> Family:
        """Reject every change of every tenant of the family until it is unfrozen."""
        return cast(Family, self._family("POST", digest, "/freeze", {}))

    def unfreeze_family(self, digest: str) -> Family:
        return cast(Family, self._family("POST", digest, "/unfreeze", {}))

    # Keys

    def keys(self) -> list[Key]:
        return cast(list[Key], list(self._server.listed("/keys")))

    def add_key(
        self,
        name: str,
        *,
        scopes: Sequence[str],
        tenants: Sequence[str],
        default_tenant: str | None = None,
        expires_at: str | None = None,
    ) -> Key:
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
        return cast(Key, self._server.request("POST", "/keys", body=body))

    def rotate_key(self, name: str) -> Key:
        """Replace a key's secret, which is in this response only; the old one stops working."""
        path = f"/keys/{part_of_path(name)}/rotate"
        return cast(Key, self._server.request("POST", path, body={}))

    def revoke_key(self, name: str) -> Key:
        return cast(Key, self._server.request("DELETE", f"/keys/{part_of_path(name)}"))

    # Rollouts, replicas, audit

    def rollouts(self, *, limit: int | None = None) -> list[Rollout]:
        """List rollouts, newest first."""
        return cast(list[Rollout], list(self._server.listed("/rollouts", {"limit": limit})))

    def rollout(self, id: int) -> Rollout:
        return cast(Rollout, self._server.request("GET", f"/rollouts/{id}"))

    def replicas(self) -> list[Replica]:
        return cast(list[Replica], list(self._server.listed("/replicas")))

    def audit(
        self,
        *,
        actor: str | None = None,
        action: str | None = None,
        target: str | None = None,
        since: str | None = None,
        until: str | None = None,
        limit: int | None = None,
        cursor: int | str | None = None,
    ) -> AuditPage:
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
        return cast(AuditPage, self._server.request("GET", "/audit", query=query))

    # Jobs

    def jobs(
        self,
        *,
        tenant: str | None = None,
        state: JobState | None = None,
        limit: int | None = None,
    ) -> list[Job]:
        """List jobs, newest first."""
        query = {"tenant": tenant, "state": state, "limit": limit}
        return cast(list[Job], list(self._server.listed("/jobs", query)))

    def job(self, id: int) -> Job:
        return cast(Job, self._server.request("GET", f"/jobs/{id}"))

    def cancel_job(self, id: int) -> Job:
        """Cancel a job; it stops between two of its steps."""
        return cast(Job, self._server.request("POST", f"/jobs/{id}/cancel", body={}))

    # Waiting

    def wait_job(
        self,
        id: int,
        *,
        timeout_s: float | None = None,
        poll_s: float = POLL_S,
        patience_s: float = PATIENCE_S,
        seen: Callable[[Job], object] = lambda job: None,
    ) -> Job:
        """Wait until a job is done, failed or cancelled; `seen` is called after every poll.

        Errors: TimeoutError after `timeout_s`; ApiError if the server is down for `patience_s`.
        """
        return poll_until_done(
            lambda: self.job(id),
            lambda job: job["state"] in ENDED,
            seen,
            unfinished=f"job {id} has not ended",
            timeout_s=timeout_s,
            poll_s=poll_s,
            patience_s=patience_s,
        )

    def wait_rollout(
        self,
        id: int,
        *,
        timeout_s: float | None = None,
        poll_s: float = POLL_S,
        patience_s: float = PATIENCE_S,
        seen: Callable[[Rollout], object] = lambda rollout: None,
    ) -> Rollout:
        """Wait until every live replica applies a rollout. Errors: as of wait_job."""
        return poll_until_done(
            lambda: self.rollout(id),
            lambda rollout: rollout["done"],
            seen,
            unfinished=f"rollout {id} is not applied by every live replica",
            timeout_s=timeout_s,
            poll_s=poll_s,
            patience_s=patience_s,
        )

    def _family(
        self, method: str, digest: str, action: str = "", body: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        path = f"/families/{part_of_path(digest)}{action}"
        return self._server.request(method, path, body=body)

    def _tenant(
        self, method: str, name: str, action: str = "", body: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        return self._server.request(method, f"/tenants/{tenant_path(name)}{action}", body=body)
