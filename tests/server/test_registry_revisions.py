"""Revisions: numbered without gaps, checked against their family, and immutable."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from registry_setup import (
    ADAPTER,
    FAMILY,
    add_published,
    add_ready,
    header,
    profile,
    registry,
    url,
)
from sqlalchemy import delete, update
from sqlalchemy.exc import DBAPIError

from safegene_server.registry import Registry, tables
from safegene_server.registry.revisions import TRANSITIONS
from safegene_vllm.errors import (
    BoundsError,
    ConflictError,
    DigestError,
    FamilyMismatchError,
    NotFoundError,
    RegistryError,
)
from safegene_vllm.formats.profile import Profile, profile_json

__all__ = ["registry", "url"]

TENANT = "acme/support"


def test_a_revision_is_read_as_it_was_added(registry: Registry) -> None:
    given = profile(1.1, 1e-300, loss=[0.1, 2.5e17], note="ü", flags={"a": None, "b": True})
    added = registry.revisions.add(TENANT, given, actor="me", adapter_digest=ADAPTER)
    assert added == registry.revisions.get(TENANT, 1) == registry.revisions.get_by_id(added.id)
    assert added.profile == given and added.profile.digest == given.digest
    assert (added.id, added.number, added.served_name) == (1, 1, "acme/support@1")
    assert (added.kind, added.adapter_digest, added.state) == ("adapter", ADAPTER, "registered")
    assert (added.reasons, added.gate, added.created_by) == ((), {}, "me")
    bare = registry.revisions.add(TENANT, profile(), actor="me")
    assert (bare.kind, bare.adapter_digest) == ("profile", None)


def test_a_tenant_is_read_with_its_published_revision(registry: Registry) -> None:
    add_ready(registry, TENANT)
    assert registry.revisions.published(TENANT) == (registry.tenants.get(TENANT), None)
    for number in (2, 3):
        published = add_published(registry, TENANT)
        assert registry.revisions.published(TENANT) == (registry.tenants.get(TENANT), published)
        assert published.number == number
    with pytest.raises(NotFoundError):
        registry.revisions.published("unknown")


def test_numbers_count_per_tenant_and_ids_over_all(registry: Registry) -> None:
    registry.tenants.add("globex", FAMILY, actor="me")
    names = [TENANT, "globex", "globex", TENANT, "globex"]
    added = [registry.revisions.add(name, profile(), actor="me") for name in names]
    assert [(one.tenant, one.number) for one in added] == [
        (TENANT, 1),
        ("globex", 1),
        ("globex", 2),
        (TENANT, 2),
        ("globex", 3),
    ]
    assert [one.id for one in added] == sorted({one.id for one in added})
    assert registry.revisions.list(TENANT) == (added[0], added[3])


def test_a_profile_must_fit_the_family(registry: Registry) -> None:
    other_family = replace(profile(), family=header(digit="e").digest)
    rejected: list[tuple[Profile, type[Exception]]] = [
        (other_family, FamilyMismatchError),
        (Profile(FAMILY, (1.0, 0.0)), BoundsError),
        (Profile(FAMILY, (1.0, 0.5, 1.0)), BoundsError),
        (Profile(FAMILY, (3.5, 0.0, 1.0)), BoundsError),
        (Profile(FAMILY, (float("nan"), 0.0, 1.0)), BoundsError),
    ]
    for given, error in rejected:
        with pytest.raises(error):
            registry.revisions.add(TENANT, given, actor="me")
    with pytest.raises(RegistryError, match="adapter_digest 'abc'"):
        registry.revisions.add(TENANT, profile(), actor="me", adapter_digest="abc")
    with pytest.raises(NotFoundError):
        registry.revisions.add("globex", profile(), actor="me")
    assert registry.revisions.list(TENANT) == ()
    assert registry.audit.page(action="revision.add").entries == ()


def test_content_is_added_only_if_the_expected_revision_is_published(registry: Registry) -> None:
    registry.revisions.add(TENANT, profile(), actor="me", expected=0)
    add_published(registry, TENANT)
    with pytest.raises(ConflictError, match=r"serves acme/support@2, expected nothing"):
        registry.revisions.add(TENANT, profile(), actor="me", expected=0)
    with pytest.raises(ConflictError, match=r"serves acme/support@2, expected acme/support@1"):
        registry.revisions.add(TENANT, profile(), actor="me", expected=1)
    assert registry.revisions.add(TENANT, profile(), actor="me", expected=2).number == 3


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("number", 9),
        ("tenant_id", 1),
        ("kind", "adapter"),
        ("adapter_digest", ADAPTER),
        ("profile_digest", "sha256:" + "0" * 64),
        ("profile", {}),
        ("created_by", "unknown"),
    ],
)
def test_content_never_changes(registry: Registry, column: str, value: Any) -> None:
    added = registry.revisions.add(TENANT, profile(), actor="me")
    change = update(tables.revisions).values({column: value})
    with (
        pytest.raises(DBAPIError, match="never changes"),
        registry.database.write("intruder") as write,
    ):
        write.connection.execute(change)
    assert registry.revisions.get(TENANT, 1) == added


def test_every_column_of_a_revision_is_fixed_or_known_to_change() -> None:
    from safegene_server.registry.migrations.versions.v0001_first import FIXED, PERMANENT

    moving = {
        "tenants": {"source", "state", "limits"},
        "revisions": {"state", "reasons", "gate"},
        "publications": {"undone"},
    }
    for name, columns in FIXED.items():
        every = {column.name for column in tables.metadata.tables[name].columns}
        assert every - set(columns.split(", ")) == moving.get(name, set()), name
    assert set(PERMANENT) == set(FIXED)


@pytest.mark.parametrize(
    "name", ["audit", "families", "publications", "revisions", "rollouts", "tenants"]
)
def test_history_is_never_deleted(registry: Registry, name: str) -> None:
    add_published(registry, TENANT)
    table = tables.metadata.tables[name]
    # Without the references only the registry's own trigger can reject the deletion.
    with (
        pytest.raises(DBAPIError, match="never deleted"),
        registry.database.write("intruder") as write,
    ):
        write.connection.execute(delete(tables.aliases))
        write.connection.execute(delete(table))
    assert registry.tenants.get(TENANT).published == 1


def test_an_altered_profile_is_detected(registry: Registry) -> None:
    add_published(registry, TENANT)
    raw = {**profile_json(profile()), "coefficients": [0.0, 0.0, 0.0]}
    drop = "DROP TRIGGER revisions_fixed"
    with registry.database.write("intruder") as write:
        sqlite = write.connection.dialect.name == "sqlite"
        write.connection.exec_driver_sql(drop if sqlite else f"{drop} ON revisions")
        write.connection.execute(update(tables.revisions).values(profile=raw))
        write.skip_audit()
    with pytest.raises(DigestError, match=r"registry, revision acme/support@1"):
        registry.snapshot()


def test_checks_make_only_the_known_transitions(registry: Registry) -> None:
    states = ["registered", "checking", "failed", "ready", "published", "superseded", "retired"]
    for start, allowed in TRANSITIONS.items():
        for goal in states:
            added = registry.revisions.add(TENANT, profile(), actor="me")
            for step in {"registered": [], "failed": ["failed"], "ready": ["ready"]}.get(
                start, ["checking"]
            ):
                registry.revisions.set_state(added.id, step, actor="gate")  # type: ignore[arg-type]
            if goal in allowed:
                moved = registry.revisions.set_state(added.id, goal, actor="gate")  # type: ignore[arg-type]
                assert moved.state == goal
            else:
                with pytest.raises(ConflictError, match=f"is {start} and cannot become {goal}"):
                    registry.revisions.set_state(added.id, goal, actor="gate")  # type: ignore[arg-type]


def test_checks_do_not_change_a_published_revision(registry: Registry) -> None:
    added = add_published(registry, TENANT)
    with pytest.raises(ConflictError, match="is published and cannot become failed"):
        registry.revisions.set_state(added.id, "failed", actor="gate")


def test_the_gate_result_is_stored(registry: Registry) -> None:
    added = registry.revisions.add(TENANT, profile(), actor="me")
    gate = {"harm": 0.25, "steps": ["ranks", "nan"]}
    registry.revisions.set_state(
        added.id, "failed", actor="gate", reasons=["harm 0.25 > 0.1"], gate=gate
    )
    again = registry.revisions.set_state(added.id, "checking", actor="gate")
    assert (again.gate, again.reasons) == (gate, ())
    with pytest.raises(RegistryError, match="gate is not plain JSON"):
        registry.revisions.set_state(added.id, "ready", actor="gate", gate={"x": float("nan")})
    with pytest.raises(NotFoundError):
        registry.revisions.set_state(99, "ready", actor="gate")
    assert registry.revisions.get_by_id(added.id) == again
    assert add_ready(registry, TENANT).number == 2


def test_a_revision_records_the_source_of_its_adapter(registry: Registry) -> None:
    """Other replicas fetch exactly this content, whatever the source of the newest revision."""
    first = registry.revisions.add(TENANT, profile(), actor="me", adapter_digest=ADAPTER)
    moved = registry.revisions.add(
        TENANT, profile(2.0), actor="me", adapter_digest=ADAPTER, source="s3://bucket/new"
    )
    bare = registry.revisions.add(TENANT, profile(), actor="me", source="s3://bucket/new")
    assert (first.source, moved.source, bare.source) == ("/adapters/acme", "s3://bucket/new", None)
    with pytest.raises(RegistryError, match="source"):
        registry.revisions.add(
            TENANT, profile(), actor="me", adapter_digest=ADAPTER, source="two\nlines"
        )
