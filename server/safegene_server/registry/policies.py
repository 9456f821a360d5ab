"""Policies of families: a floor under the coefficients of all tenants, and a freeze.

For an operator who must act on all tenants at once. A single tenant is frozen in tenants.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isfinite
from typing import Any

from sqlalchemy import Connection, delete

from safegene_server.registry import tables
from safegene_server.registry.database import Database, Write
from safegene_server.registry.families import find_family
from safegene_server.registry.records import Policy, Revision, Rollout, Tenant
from safegene_server.registry.revisions import find_revision, new_revision
from safegene_server.registry.rollouts import switch
from safegene_server.registry.tenants import current_tenants, find_policy
from safegene_vllm.errors import BoundsError, FrozenError
from safegene_vllm.formats.family import FamilyHeader
from safegene_vllm.formats.profile import Profile, check_profile


class Policies:
    """Floor and freeze of a whole family."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def set_floor(self, family: str, floor: Mapping[int, float], *, actor: str) -> Rollout | None:
        """Set the least coefficient per layer for all tenants of a family.

        Every published revision below `floor` gets a successor with the same adapter and raised
        coefficients, all published in one rollout; None if no revision was below. `{}` removes the
        floor and lowers no coefficient. Revisions below the floor can neither be added nor
        published. Errors: NotFoundError; BoundsError; FrozenError naming every frozen tenant that
        would have to change, without changing any.
        """
        with self._database.write(actor) as write:
            header = find_family(write.connection, family).header
            minimums = _checked_floor(header, floor)
            before = find_policy(write.connection, family)
            if before.floor == minimums:
                write.skip_audit()
                return None
            below = _find_below(write.connection, family, minimums)
            if below:
                _check_not_frozen(before, [tenant for tenant, _ in below])
            _put(write, replace(before, floor=minimums))
            raised = [
                (tenant, _raise(write, header, tenant, revision, minimums))
                for tenant, revision in below
            ]
            write.audit(
                "family.floor",
                family,
                before=_floor_json(before.floor),
                after=_floor_json(minimums),
                raised=[revision.served_name for _, revision in raised],
            )
            if raised:
                return switch(write, "floor", raised)
            write.bump()
            return None

    def freeze(self, family: str, *, actor: str) -> Policy:
        """Reject changes of all tenants of a family, while they are served as before."""
        return self._set_frozen(family, True, actor)

    def unfreeze(self, family: str, *, actor: str) -> Policy:
        """Allow changes again, except of tenants that are frozen themselves."""
        return self._set_frozen(family, False, actor)

    def _set_frozen(self, family: str, frozen: bool, actor: str) -> Policy:
        with self._database.write(actor) as write:
            find_family(write.connection, family)
            before = find_policy(write.connection, family)
            if before.frozen == frozen:
                write.skip_audit()
                return before
            after = replace(before, frozen=frozen)
            _put(write, after)
            action = "family.freeze" if frozen else "family.unfreeze"
            write.audit(action, family, version=write.bump())
            return after

    def get(self, family: str) -> Policy:
        """Return the policy of a family. Errors: NotFoundError."""
        with self._database.read() as connection:
            find_family(connection, family)
            return find_policy(connection, family)


def _checked_floor(header: FamilyHeader, floor: Mapping[int, float]) -> dict[int, float]:
    """Check and sort a floor. Errors: BoundsError naming every invalid layer."""
    low, high = header.bounds
    selected = {entry.layer for entry in header.layers}
    errors = []
    for layer, minimum in floor.items():
        if type(layer) is not int or layer not in selected:
            errors.append(f"layer {layer!r} has no vector, only {sorted(selected)} do")
        elif (
            type(minimum) not in (int, float) or not isfinite(minimum) or not low <= minimum <= high
        ):
            errors.append(f"layer {layer} has floor {minimum!r}, expected {low} to {high}")
    if errors:
        raise BoundsError(f"floor of family {header.name!r}: " + "; ".join(errors))
    return {layer: float(floor[layer]) for layer in sorted(floor)}


def _find_below(
    connection: Connection, family: str, floor: Mapping[int, float]
) -> list[tuple[Tenant, Revision]]:
    """Find the tenants of a family whose published revision is below the floor somewhere."""
    found = []
    for tenant in current_tenants(connection):
        if tenant.family == family and tenant.published is not None:
            revision = find_revision(connection, tenant, tenant.published)
            coefficients = revision.profile.coefficients
            if any(coefficients[layer] < minimum for layer, minimum in floor.items()):
                found.append((tenant, revision))
    return found


def _raise(
    write: Write,
    header: FamilyHeader,
    tenant: Tenant,
    revision: Revision,
    floor: Mapping[int, float],
) -> Revision:
    """Add the successor of `revision`, with its coefficients raised to the floor."""
    old = revision.profile
    raised = tuple(
        max(value, floor.get(layer, value)) for layer, value in enumerate(old.coefficients)
    )
    origin = {"raised_from": old.digest, "floor": _floor_json(floor)}
    profile = Profile(old.family, raised, {**old.calibration, "floor": origin})
    check_profile(profile, header)
    gate = {"raised_from": revision.served_name}
    return new_revision(
        write,
        tenant,
        revision.adapter_digest,
        profile,
        source=revision.source,
        state="ready",
        gate=gate,
    )


def _check_not_frozen(policy: Policy, tenants: list[Tenant]) -> None:
    if policy.frozen:
        raise FrozenError(
            f"family {policy.family} is frozen and {len(tenants)} of its tenants are below the new "
            "floor; unfreeze the family first"
        )
    frozen = [tenant.name for tenant in tenants if tenant.state == "frozen"]
    if frozen:
        raise FrozenError(
            f"frozen tenants are below the new floor: {', '.join(frozen)}; unfreeze them first"
        )


def _floor_json(floor: Mapping[int, float]) -> dict[str, Any]:
    return {str(layer): minimum for layer, minimum in floor.items()}


def _put(write: Write, policy: Policy) -> None:
    rows = tables.policies
    write.connection.execute(delete(rows).where(rows.c.family_digest == policy.family))
    write.insert(
        rows, family_digest=policy.family, floor=_floor_json(policy.floor), frozen=policy.frozen
    )
