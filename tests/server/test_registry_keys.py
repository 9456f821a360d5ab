"""Keys: secrets are returned once, stored as hashes, and not in the database's files."""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from registry_setup import postgres, registry, url

from safegene_server.registry import Registry
from safegene_vllm.errors import ConflictError, NotFoundError, RegistryError

__all__ = ["registry", "url"]

GIVEN = "0123456789abcdef0123456789abcdef"


def database_bytes(registry: Registry) -> bytes:
    """Everything the database has written, journals included."""
    if registry.database.is_postgresql:
        postgres().execute("CHECKPOINT", str(registry.database.url.database))
        folder = postgres().folder / "data"
        paths = [path for part in ("base", "pg_wal") for path in (folder / part).rglob("*")]
    else:
        paths = list(Path(str(registry.database.url.database)).parent.glob("*"))
    return b"".join(path.read_bytes() for path in paths if path.is_file())


def test_a_secret_is_returned_once_and_not_stored(registry: Registry) -> None:
    first = registry.keys.add("first", scopes=["serve"], tenants=["*"], actor="me")
    second = registry.keys.rotate("first", actor="me")
    third = registry.keys.add("own", scopes=["admin"], tenants=[], actor="me", secret=GIVEN)
    written = database_bytes(registry)
    for new_key in (first, second, third):
        assert new_key.secret.encode() not in written
        assert new_key.secret[8:24].encode() not in written
        assert new_key.secret not in repr(new_key) and new_key.key.hash not in repr(new_key)
    # The search does find what is stored.
    assert second.key.hash.encode() in written and b"key.rotate" in written


def test_secrets_have_256_bits_and_the_usual_shape(registry: Registry) -> None:
    new_keys = [
        registry.keys.add(f"key {n}", scopes=["serve"], tenants=["a"], actor="me") for n in range(5)
    ]
    assert len({new.secret for new in new_keys}) == 5
    for new in new_keys:
        assert re.fullmatch(r"sg-[A-Za-z0-9_-]{43}", new.secret)
        assert new.key.prefix == new.secret[:8]
        assert new.key.hash == hashlib.sha256(new.secret.encode()).hexdigest()


def test_a_key_is_read_as_it_was_added(registry: Registry) -> None:
    until = datetime(2031, 5, 6, 7, 8, 9, tzinfo=timezone(timedelta(hours=2)))
    new = registry.keys.add(
        "ci",
        scopes=["serve", "read", "serve"],
        tenants=["globex", "acme/support", "base"],
        default_tenant="acme/support",
        expires_at=until,
        actor="me",
    )
    key = registry.keys.get("ci")
    assert key == new.key == registry.keys.list()[0] == registry.snapshot().keys[0]
    assert key.scopes == ("read", "serve")
    assert key.tenants == ("acme/support", "base", "globex")
    assert (key.default_tenant, key.revoked_at) == ("acme/support", None)
    assert key.expires_at == until
    assert key.expires_at is not None and key.expires_at.tzinfo is UTC


def test_a_rotated_key_has_one_secret_and_the_same_rights(registry: Registry) -> None:
    old = registry.keys.add("ci", scopes=["read"], tenants=["a"], actor="me")
    new = registry.keys.rotate("ci", actor="me")
    assert [key.hash for key in registry.snapshot().keys] == [new.key.hash]
    assert new.key.hash != old.key.hash
    assert (new.key.scopes, new.key.tenants) == (old.key.scopes, old.key.tenants)


def test_a_revoked_key_is_listed_but_not_in_snapshots(registry: Registry) -> None:
    registry.keys.add("ci", scopes=["read"], tenants=["a"], actor="me")
    version = registry.version()
    revoked = registry.keys.revoke("ci", actor="me")
    assert revoked.revoked_at is not None
    assert registry.keys.list() == (revoked,)
    assert (registry.snapshot().keys, registry.version()) == ((), version + 1)
    for change in (
        lambda: registry.keys.revoke("ci", actor="me"),
        lambda: registry.keys.rotate("ci", actor="me"),
        lambda: registry.keys.add("ci", scopes=["read"], tenants=[], actor="me"),
    ):
        with pytest.raises(ConflictError):
            change()


def test_invalid_keys_are_rejected(registry: Registry) -> None:
    def add(**changes: object) -> None:
        options = {"scopes": ["serve"], "tenants": ["a"], "actor": "me", **changes}
        registry.keys.add("ci", **options)  # type: ignore[arg-type]

    with pytest.raises(RegistryError, match=r"scopes \['root'\]: expected one or more of admin"):
        add(scopes=["root"])
    with pytest.raises(RegistryError, match="scopes"):
        add(scopes=[])
    with pytest.raises(RegistryError, match="tenant name 'A B'"):
        add(tenants=["A B"])
    with pytest.raises(RegistryError, match="default_tenant 'b' is not among"):
        add(default_tenant="b")
    with pytest.raises(RegistryError, match="tenant name 'B C'"):
        add(tenants=["*"], default_tenant="B C")
    with pytest.raises(RegistryError, match="no time zone"):
        add(expires_at=datetime(2031, 1, 1))
    with pytest.raises(RegistryError, match="32 to 200 visible ASCII") as caught:
        add(secret="too short to be one")
    assert "too short to be one" not in str(caught.value)
    assert registry.keys.list() == ()


def test_a_secret_belongs_to_one_key(registry: Registry) -> None:
    registry.keys.add("one", scopes=["read"], tenants=[], actor="me", secret=GIVEN)
    with pytest.raises(ConflictError, match="another key has this secret"):
        registry.keys.add("two", scopes=["admin"], tenants=[], actor="me", secret=GIVEN)
    with pytest.raises(NotFoundError, match="no key 'two'"):
        registry.keys.get("two")
