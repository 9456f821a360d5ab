"""API keys: what each may do, and the hash by which it is known. Secrets are told once, never kept.

For administration; requests are let in by access, from a snapshot.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, insert, select, update

from safegene_server.registry import tables, validation
from safegene_server.registry.database import Database
from safegene_server.registry.records import Key, NewKey
from safegene_vllm.errors import ConflictError, NotFoundError, RegistryError

_T = tables.keys
_PREFIX_CHARACTERS = 8
_GIVEN = re.compile(r"[\x21-\x7e]{32,200}")


class Keys:
    """API keys of the registry."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(
        self,
        name: str,
        *,
        scopes: Iterable[str],
        tenants: Iterable[str],
        actor: str,
        default_tenant: str | None = None,
        expires_at: datetime | None = None,
        secret: str | None = None,
    ) -> NewKey:
        """A key for `tenants` (names, `base`, or `*`), which need not exist yet.

        `secret=None` makes one; a given one comes from the owner's own secret store.
        Errors: RegistryError; ConflictError if the name or the secret is in use.
        """
        validation.line(name, "key name", 100)
        allowed, reach = validation.scopes(scopes), validation.key_tenants(tenants, default_tenant)
        if default_tenant is not None:
            validation.tenant_name(default_tenant)
        if expires_at is not None and expires_at.tzinfo is None:
            raise RegistryError(f"expires_at {expires_at} has no time zone; give one, such as UTC")
        told = _new_secret() if secret is None else check_secret(secret)
        with self._database.write(actor) as write:
            if _find(write.connection, name) is not None:
                raise ConflictError(f"key {name!r} exists; rotate it, or choose another name")
            _refuse_known(write.connection, told)
            write.connection.execute(
                insert(_T).values(
                    name=name,
                    hash=hash_of(told),
                    prefix=told[:_PREFIX_CHARACTERS],
                    scopes=allowed,
                    tenants=reach,
                    default_tenant=default_tenant,
                    expires_at=expires_at,
                    created_at=write.now,
                )
            )
            write.audit(
                "key.add",
                name,
                prefix=told[:_PREFIX_CHARACTERS],
                scopes=allowed,
                tenants=reach,
                expires_at=None if expires_at is None else expires_at.isoformat(),
                version=write.bump(),
            )
            return NewKey(find_key(write.connection, name), told)

    def rotate(self, name: str, *, actor: str, secret: str | None = None) -> NewKey:
        """A new secret for a key; the old one ends with this call.

        Errors: NotFoundError; ConflictError if the key is revoked.
        """
        told = _new_secret() if secret is None else check_secret(secret)
        with self._database.write(actor) as write:
            before = _usable(write.connection, name)
            _refuse_known(write.connection, told)
            prefix = told[:_PREFIX_CHARACTERS]
            change = update(_T).where(_T.c.name == name)
            write.connection.execute(change.values(hash=hash_of(told), prefix=prefix))
            write.audit(
                "key.rotate", name, before=before.prefix, after=prefix, version=write.bump()
            )
            return NewKey(find_key(write.connection, name), told)

    def revoke(self, name: str, *, actor: str) -> Key:
        """The key lets nobody in any more; its row stays. Errors: NotFoundError, ConflictError."""
        with self._database.write(actor) as write:
            _usable(write.connection, name)
            write.connection.execute(
                update(_T).where(_T.c.name == name).values(revoked_at=write.now)
            )
            write.audit("key.revoke", name, version=write.bump())
            return find_key(write.connection, name)

    def get(self, name: str) -> Key:
        """Errors: NotFoundError."""
        with self._database.read() as connection:
            return find_key(connection, name)

    def list(self) -> tuple[Key, ...]:
        """All of them by name, the revoked ones among them."""
        with self._database.read() as connection:
            return tuple(_key(row) for row in connection.execute(select(_T).order_by(_T.c.name)))


def hash_of(secret: str) -> str:
    """What is kept of a secret. It has 256 random bits, so there is nothing to guess or salt."""
    return hashlib.sha256(secret.encode("utf-8")).hexdigest()


def usable_keys(connection: Connection) -> tuple[Key, ...]:
    """Those not revoked; whether one has expired is for whoever lets requests in."""
    query = select(_T).where(_T.c.revoked_at.is_(None)).order_by(_T.c.name)
    return tuple(_key(row) for row in connection.execute(query))


def find_key(connection: Connection, name: str) -> Key:
    """Errors: NotFoundError."""
    found = _find(connection, name)
    if found is None:
        raise NotFoundError(f"no key {name!r:.100} in the registry")
    return found


def _new_secret() -> str:
    return "sg-" + secrets.token_urlsafe(32)


def check_secret(secret: str) -> str:
    """Check a secret that was not made here. Errors: RegistryError."""
    if not isinstance(secret, str) or not _GIVEN.fullmatch(secret):
        raise RegistryError(
            "the given secret is not 32 to 200 visible ASCII characters; make one with "
            "`openssl rand -hex 32`"
        )
    return secret


def _refuse_known(connection: Connection, secret: str) -> None:
    if connection.execute(select(_T.c.id).where(_T.c.hash == hash_of(secret))).first():
        raise ConflictError("another key has this secret; every key needs its own")


def _usable(connection: Connection, name: str) -> Key:
    key = find_key(connection, name)
    if key.revoked_at is not None:
        raise ConflictError(f"key {name!r} is revoked since {key.revoked_at}; add another key")
    return key


def _find(connection: Connection, name: str) -> Key | None:
    row = connection.execute(select(_T).where(_T.c.name == name)).one_or_none()
    return None if row is None else _key(row)


def _key(row: Row[tuple[Any, ...]]) -> Key:
    return Key(
        name=row.name,
        hash=row.hash,
        prefix=row.prefix,
        scopes=tuple(row.scopes),
        tenants=tuple(row.tenants),
        default_tenant=row.default_tenant,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        created_at=row.created_at,
    )
