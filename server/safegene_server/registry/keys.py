"""API keys: scopes, tenants and the hash of the secret. A secret is returned once and never stored.

Requests are authorized by access, from a snapshot.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable
from datetime import datetime

from sqlalchemy import Connection, select, update

from safegene_server.registry import tables, validation
from safegene_server.registry.database import Database
from safegene_server.registry.records import Key, NewKey, from_row
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
        """Add a key for `tenants` (names, `base`, or `*`), which need not exist yet.

        `secret=None` generates one; a given one comes from a secret store of the operator.
        Errors: RegistryError; ConflictError if the name or the secret is in use.
        """
        validation.line(name, "key name", 100)
        allowed, reach = validation.scopes(scopes), validation.key_tenants(tenants, default_tenant)
        if default_tenant is not None:
            validation.tenant_name(default_tenant)
        if expires_at is not None and expires_at.tzinfo is None:
            raise RegistryError(f"expires_at {expires_at} has no time zone; give one, such as UTC")
        secret = _new_secret() if secret is None else check_secret(secret)
        with self._database.write(actor) as write:
            if _find(write.connection, name) is not None:
                raise ConflictError(f"key {name!r} exists; rotate it, or choose another name")
            _check_unused(write.connection, secret)
            write.insert(
                _T,
                name=name,
                hash=hash_of(secret),
                prefix=secret[:_PREFIX_CHARACTERS],
                scopes=allowed,
                tenants=reach,
                default_tenant=default_tenant,
                expires_at=expires_at,
                created_at=write.now,
            )
            write.audit(
                "key.add",
                name,
                prefix=secret[:_PREFIX_CHARACTERS],
                scopes=allowed,
                tenants=reach,
                expires_at=None if expires_at is None else expires_at.isoformat(),
                version=write.bump(),
            )
            return NewKey(find_key(write.connection, name), secret)

    def rotate(self, name: str, *, actor: str, secret: str | None = None) -> NewKey:
        """Replace the secret of a key; the old one is invalid at once.

        Errors: NotFoundError; ConflictError if the key is revoked.
        """
        secret = _new_secret() if secret is None else check_secret(secret)
        with self._database.write(actor) as write:
            before = _find_usable(write.connection, name)
            _check_unused(write.connection, secret)
            prefix = secret[:_PREFIX_CHARACTERS]
            change = update(_T).where(_T.c.name == name)
            write.connection.execute(change.values(hash=hash_of(secret), prefix=prefix))
            write.audit(
                "key.rotate", name, before=before.prefix, after=prefix, version=write.bump()
            )
            return NewKey(find_key(write.connection, name), secret)

    def revoke(self, name: str, *, actor: str) -> Key:
        """Invalidate a key for good; its row stays. Errors: NotFoundError, ConflictError."""
        with self._database.write(actor) as write:
            _find_usable(write.connection, name)
            write.connection.execute(
                update(_T).where(_T.c.name == name).values(revoked_at=write.now)
            )
            write.audit("key.revoke", name, version=write.bump())
            return find_key(write.connection, name)

    def get(self, name: str) -> Key:
        """Return a key. Errors: NotFoundError."""
        with self._database.read() as connection:
            return find_key(connection, name)

    def list(self) -> tuple[Key, ...]:
        """Return all keys by name, including revoked ones."""
        with self._database.read() as connection:
            return tuple(
                from_row(Key, row) for row in connection.execute(select(_T).order_by(_T.c.name))
            )


def hash_of(secret: str) -> str:
    """Hash a secret for storage. Secrets are random, so neither salt nor stretching is needed."""
    return hashlib.sha256(secret.encode("utf-8")).hexdigest()


def usable_keys(connection: Connection) -> tuple[Key, ...]:
    """Read the keys that are not revoked; expiry is checked with each request."""
    query = select(_T).where(_T.c.revoked_at.is_(None)).order_by(_T.c.name)
    return tuple(from_row(Key, row) for row in connection.execute(query))


def find_key(connection: Connection, name: str) -> Key:
    """Read a key. Errors: NotFoundError."""
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


def _check_unused(connection: Connection, secret: str) -> None:
    if connection.execute(select(_T.c.id).where(_T.c.hash == hash_of(secret))).first():
        raise ConflictError("another key has this secret; every key needs its own")


def _find_usable(connection: Connection, name: str) -> Key:
    key = find_key(connection, name)
    if key.revoked_at is not None:
        raise ConflictError(f"key {name!r} was revoked at {key.revoked_at}; add another key")
    return key


def _find(connection: Connection, name: str) -> Key | None:
    row = connection.execute(select(_T).where(_T.c.name == name)).one_or_none()
    return None if row is None else from_row(Key, row)
