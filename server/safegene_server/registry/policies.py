"""What holds for a whole family, in one call each: a floor under its coefficients, and a freeze.

For an operator who must act on all tenants at once. One tenant is frozen in tenants.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isfinite
from typing import Any

from sqlalchemy import Connection, delete, insert

from safegene_server.registry import tables
from safegene_server.registry.database import Database, Write
from safegene_server.registry.families import find_family
from safegene_server.registry.records import Policy, Revision, Rollout, Tenant
from safegene_server.registry.revisions import find_revision, new_revision
from safegene_server.registry.rollouts import switch
from safegene_server.registry.tenants import find_policy, living_tenants
from safegene_vllm.errors import BoundsError, FrozenError
from safegene_vllm.formats.family import FamilyHeader
from safegene_vllm.formats.profile import Profile, check_profile


class Policies:
    """Floor and freeze of a whole family."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def set_floor(self, family: str, floor: Mapping[int, float], *, actor: str) -> Rollout | None:
        """No coefficient of the family is served below `floor` (layer -> least), from now on.

        Every published revision that is below gets a successor with the same adapter and raised
        coefficients, published at once and all together; None if there was none to raise. `{}`
        lifts the floor, which lowers nobody's coefficients. Revisions below the floor can neither
        be added nor published. Errors: NotFoundError; BoundsError; FrozenError naming every frozen
        tenant that would have to change, and then nothing is changed.
        """
        with self._database.write(actor) as write:
            header = find_family(write.connection, family).header
            least = _checked_floor(header, floor)
            before = find_policy(write.connection, family)
            if before.floor == least:
                write.unaudited()
                return None
            raised = _below(write.connection, family, least)
            if raised:
                _refuse_frozen(before, [tenant for tenant, _ in raised])
            _put(write, replace(before, floor=least))
            lora_weights = [
                (tenant, _raise(write, header, tenant, revision, least))
                for tenant, revision in raised
            ]
            write.audit(
                "family.floor",
                family,
                before=_floor_json(before.floor),
                after=_floor_json(least),
                raised=[revision.served_name for _, revision in lora_weights],
            )
            if lora_weights:
                return switch(write, "floor", lora_weights)
            write.bump()
            return None

    def freeze(self, family: str, *, actor: str) -> Policy:
        """No tenant of the family may change what it serves; serving goes on."""
        return self._set_frozen(family, True, actor)

    def unfreeze(self, family: str, *, actor: str) -> Policy:
        """Changes are allowed again, except to tenants that are frozen themselves."""
        return self._set_frozen(family, False, actor)

    def _set_frozen(self, family: str, frozen: bool, actor: str) -> Policy:
        with self._database.write(actor) as write:
            find_family(write.connection, family)
            before = find_policy(write.connection, family)
            if before.frozen == frozen:
                write.unaudited()
                return before
            after = replace(before, frozen=frozen)
            _put(write, after)
            action = "family.freeze" if frozen else "family.unfreeze"
            write.audit(action, family, version=write.bump())
            return after

    def get(self, family: str) -> Policy:
        """Errors: NotFoundError."""
        with self._database.read() as connection:
            find_family(connection, family)
            return find_policy(connection, family)


def _checked_floor(header: FamilyHeader, floor: Mapping[int, float]) -> dict[int, float]:
    """Errors: BoundsError naming every layer that can have no such floor."""
    low, high = header.bounds
    selected = {entry.layer for entry in header.layers}
    faults = []
    for layer, least in floor.items():
        if type(layer) is not int or layer not in selected:
            faults.append(f"layer {layer!r} carries no vector, only {sorted(selected)} do")
        elif type(least) not in (int, float) or not isfinite(least) or not low <= least <= high:
            faults.append(f"layer {layer} has floor {least!r}, expected {low} to {high}")
    if faults:
        raise BoundsError(f"floor of family {header.name!r}: " + "; ".join(faults))
    return {layer: float(floor[layer]) for layer in sorted(floor)}


def _below(
    connection: Connection, family: str, floor: Mapping[int, float]
) -> list[tuple[Tenant, Revision]]:
    """Tenants of the family whose published revision has a coefficient below the floor."""
    found = []
    for tenant in living_tenants(connection):
        if tenant.family == family and tenant.published is not None:
            revision = find_revision(connection, tenant, tenant.published)
            coefficients = revision.profile.coefficients
            if any(coefficients[layer] < least for layer, least in floor.items()):
                found.append((tenant, revision))
    return found


def _raise(
    write: Write,
    header: FamilyHeader,
    tenant: Tenant,
    revision: Revision,
    floor: Mapping[int, float],
) -> Revision:
    """The successor of `revision` with no coefficient below the floor."""
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


def _refuse_frozen(policy: Policy, tenants: list[Tenant]) -> None:
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
    return {str(layer): least for layer, least in floor.items()}


def _put(write: Write, policy: Policy) -> None:
    rows = tables.policies
    write.connection.execute(delete(rows).where(rows.c.family_digest == policy.family))
    write.connection.execute(
        insert(rows).values(
            family_digest=policy.family, floor=_floor_json(policy.floor), frozen=policy.frozen
        )
    )
