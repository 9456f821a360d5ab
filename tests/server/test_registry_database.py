"""Transactions: read-only reads, atomic writes, and databases that are down."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import threading
from contextlib import closing
from datetime import datetime
from pathlib import Path

import pytest
from registry_setup import FAMILY, HEADER, postgres, registry, url
from sqlalchemy import insert, text
from sqlalchemy.exc import DBAPIError

from safegene_server.registry import Registry, database, tables
from safegene_server.registry.database import parse_url
from safegene_vllm.errors import ConfigError, RegistryDownError, RegistryError

__all__ = ["registry", "url"]

ROW = {"family_digest": FAMILY, "floor": {}, "frozen": True}


def test_a_read_cannot_write(registry: Registry) -> None:
    with (
        pytest.raises((DBAPIError, RegistryDownError), match=r"(?i)read-?only"),
        registry.database.read() as connection,
    ):
        connection.execute(insert(tables.policies).values(ROW))
    assert not registry.policies.get(FAMILY).frozen


@pytest.mark.parametrize("timestamp", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-12:00"])
def test_a_timestamp_without_a_utc_equivalent_is_rejected(
    registry: Registry, timestamp: str
) -> None:
    with pytest.raises(RegistryError, match="no database can hold"):
        registry.audit.page(since=datetime.fromisoformat(timestamp))


def test_a_write_without_an_audit_entry_is_rolled_back(registry: Registry) -> None:
    with (
        pytest.raises(RuntimeError, match="without an audit entry"),
        registry.database.write("me") as write,
    ):
        write.connection.execute(insert(tables.policies).values(ROW))
    assert not registry.policies.get(FAMILY).frozen


def test_an_exception_rolls_back_the_whole_write(registry: Registry) -> None:
    before = (registry.version(), registry.audit.page())
    with pytest.raises(ZeroDivisionError), registry.database.write("me") as write:
        write.connection.execute(insert(tables.policies).values(ROW))
        write.bump()
        write.audit("family.freeze", FAMILY)
        raise ZeroDivisionError
    assert (registry.version(), registry.audit.page()) == before
    assert not registry.policies.get(FAMILY).frozen


@pytest.mark.parametrize("actor", ["", "two\nlines", "x" * 201, "nul\x00", None])
def test_every_write_has_an_actor(registry: Registry, actor: str) -> None:
    with pytest.raises(RegistryError, match="actor"):
        registry.policies.freeze(FAMILY, actor=actor)
    assert not registry.policies.get(FAMILY).frozen


def test_a_read_is_consistent_during_concurrent_writes(registry: Registry) -> None:
    count = text("SELECT count(*) FROM tenants")
    with registry.database.read() as connection:
        assert connection.execute(count).scalar_one() == 1
        writer = threading.Thread(
            target=registry.tenants.add, args=("globex", FAMILY), kwargs={"actor": "other"}
        )
        writer.start()
        writer.join(10)
        assert not writer.is_alive()
        assert connection.execute(count).scalar_one() == 1
    assert len(registry.tenants.list()) == 2


def test_a_writer_that_waits_too_long_fails(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "LOCK_TIMEOUT_S", 1.0)
    other = Registry(registry.database.url)
    with registry.database.write("slow") as write:
        with pytest.raises(RegistryDownError, match="busy"):
            other.policies.freeze(FAMILY, actor="hasty")
        write.skip_audit()
    other.policies.freeze(FAMILY, actor="hasty")
    other.close()


def test_a_writer_that_hangs_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    server = postgres()
    name = server.create("migrated")
    opened, other = Registry(server.url(name)), Registry(server.url(name))
    opened.families.add(HEADER, None, actor="test")
    monkeypatch.setattr(database, "IDLE_TIMEOUT_S", 1.0)
    with pytest.raises(RegistryDownError, match="idle"), opened.database.write("hung") as write:
        write.bump()
        write.audit("family.freeze", FAMILY)
        # Waits until the server disconnects the other.
        other.policies.freeze(FAMILY, actor="other")
        write.connection.execute(text("SELECT 1"))
    assert [entry.actor for entry in other.audit.page().entries] == ["other", "test"]
    assert other.version() == opened.version() == 2
    opened.close()
    other.close()
    server.drop(name)


@pytest.mark.parametrize("value", ["nul\x00", "half \ud800", "x" * 10_000])
def test_unusual_names_are_not_found(registry: Registry, value: str) -> None:
    for read in (
        registry.tenants.get,
        registry.families.get,
        registry.keys.get,
        registry.revisions.list,
    ):
        with pytest.raises(RegistryError):
            read(value)


def test_huge_numbers_are_not_found(registry: Registry) -> None:
    for read in (registry.jobs.get, registry.revisions.get_by_id, registry.rollouts.status):
        for value in (2**31, 2**63, 10**30, -1, 0):
            with pytest.raises(RegistryError):
                read(value)


def test_the_error_of_an_unreachable_database_hides_the_password() -> None:
    address = "postgresql://someone:s3cret@127.0.0.1:1/registry"
    with pytest.raises(RegistryDownError, match=r"someone:\*\*\*@127\.0\.0\.1") as caught:
        Registry(address)
    assert "s3cret" not in str(caught.value)


def test_the_pool_survives_terminated_connections(tmp_path: Path) -> None:
    server = postgres()
    name = server.create("migrated")
    opened = Registry(server.url(name))
    opened.families.add(HEADER, None, actor="test")
    terminate = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
    assert server.execute(terminate)
    assert opened.version() == 1
    opened.close()
    server.drop(name)


def test_only_the_owner_may_read_a_sqlite_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "registry.db"
    old = os.umask(0)
    try:
        Registry(path).close()
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_path_that_is_a_directory_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(RegistryDownError, match="check path and permissions"):
        Registry(tmp_path)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("registry.db", "sqlite:///registry.db"),
        (Path("/a/registry.db"), "sqlite:////a/registry.db"),
        ("sqlite:////a/b.db", "sqlite:////a/b.db"),
        ("postgres://u:p@h:1/d", "postgresql+psycopg://u:p@h:1/d"),
        ("postgresql://h/d", "postgresql+psycopg://h/d"),
        ("postgresql+psycopg://h/d", "postgresql+psycopg://h/d"),
    ],
)
def test_valid_urls(given: str | Path, expected: str) -> None:
    assert parse_url(given).render_as_string(hide_password=False) == expected


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("mysql://u:s3cret@h/d", "expected sqlite"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("postgresql://u:s3cret@h:port/d", "cannot be read"),
        ("://", "cannot be read"),
    ],
)
def test_errors_of_invalid_urls_hide_the_password(given: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        parse_url(given)
    assert "s3cret" not in str(caught.value)


def test_a_copied_file_is_the_same_registry(tmp_path: Path) -> None:
    opened = Registry(tmp_path / "one.db")
    opened.families.add(HEADER, None, actor="test")
    before = opened.snapshot()
    opened.close()
    shutil.copy(tmp_path / "one.db", tmp_path / "two.db")
    copied = Registry(tmp_path / "two.db")
    assert copied.snapshot() == before
    copied.close()


def replace_file(path: Path, other: Path) -> None:
    """Move another database to the path, as `mv` does, and delete the files of the old one."""
    for leftover in (f"{path}-wal", f"{path}-shm"):
        Path(leftover).unlink(missing_ok=True)
    os.replace(other, path)


def test_the_new_file_is_used_after_a_replacement(tmp_path: Path) -> None:
    path = tmp_path / "r.db"
    opened = Registry(path)
    opened.families.add(HEADER, None, actor="test")
    with (
        closing(sqlite3.connect(path)) as source,
        closing(sqlite3.connect(tmp_path / "copy.db")) as copy,
    ):
        source.backup(copy)
    opened.tenants.add("lost", FAMILY, actor="test")
    seen, _ = opened.position()
    replace_file(path, tmp_path / "copy.db")
    assert opened.position(seen)[1] and opened.tenants.list() == ()
    opened.tenants.add("new", FAMILY, actor="test")
    other = Registry(path)
    assert [tenant.name for tenant in other.tenants.list()] == ["new"]
    other.close()
    opened.close()


def test_a_deleted_file_is_an_error_and_is_not_created_again(tmp_path: Path) -> None:
    path = tmp_path / "r.db"
    opened = Registry(path)
    opened.families.add(HEADER, None, actor="test")
    os.rename(path, tmp_path / "elsewhere.db")
    for call in (opened.version, lambda: opened.tenants.add("acme", FAMILY, actor="test")):
        with pytest.raises(RegistryDownError, match="unable to open"):
            call()
    assert not path.exists()
    os.rename(tmp_path / "elsewhere.db", path)
    assert opened.version() == 1 and opened.tenants.list() == ()
    opened.close()


def test_a_write_into_a_file_that_is_replaced_meanwhile_fails(tmp_path: Path) -> None:
    path = tmp_path / "r.db"
    opened = Registry(path)
    opened.families.add(HEADER, None, actor="test")
    Registry(tmp_path / "other.db").close()
    with (
        pytest.raises(RegistryDownError, match="was replaced or deleted while it was written"),
        opened.database.write("me") as write,
    ):
        write.bump()
        write.audit("family.freeze", FAMILY)
        replace_file(path, tmp_path / "other.db")
    assert opened.version() == 0
    opened.close()
