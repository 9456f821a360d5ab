"""Families in the registry. A family is added once and never changed.

Floors and freezes of families are in policies.
"""

from __future__ import annotations

from sqlalchemy import Connection, Row, select

from safegene_server.registry import tables, validation
from safegene_server.registry.database import Database
from safegene_server.registry.family_json import header_json, parse_header
from safegene_server.registry.records import Family
from safegene_vllm.errors import ConflictError, NotFoundError
from safegene_vllm.formats.family import FamilyHeader

_T = tables.families


class Families:
    """Families of the registry."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, header: FamilyHeader, source: str | None, *, actor: str) -> Family:
        """Register a family. A family that is registered already is returned unchanged.

        Errors: RegistryError; ConflictError if the digest is registered with another header.
        """
        validation.digest(header.digest, f"family {header.name!r}: digest")
        validation.line(header.name, "family name")
        if source is not None:
            validation.line(source, "source", 4000)
        raw = header_json(header)
        with self._database.write(actor) as write:
            known = _find(write.connection, header.digest)
            if known is not None:
                if header_json(known.header) != raw:
                    raise ConflictError(
                        f"family {header.digest} is registered as {known.name!r} with another "
                        f"header than this {header.name!r}; fetch both again, one is damaged"
                    )
                write.skip_audit()
                return known
            write.insert(
                _T,
                digest=header.digest,
                name=header.name,
                header=raw,
                source=source,
                created_at=write.now,
            )
            version = write.bump()
            write.audit(
                "family.add", header.digest, name=header.name, source=source, version=version
            )
            return find_family(write.connection, header.digest)

    def get(self, digest: str) -> Family:
        """Return the family with this digest. Errors: NotFoundError."""
        with self._database.read() as connection:
            return find_family(connection, digest)

    def list(self) -> tuple[Family, ...]:
        """Return all families in the order in which they were added."""
        query = select(_T).order_by(_T.c.created_at, _T.c.digest)
        with self._database.read() as connection:
            return tuple(_family(row) for row in connection.execute(query))


def find_family(connection: Connection, digest: str) -> Family:
    """Read the family with this digest. Errors: NotFoundError."""
    found = _find(connection, digest)
    if found is None:
        raise NotFoundError(f"no family {digest!r:.100} in the registry; add it first")
    return found


def _find(connection: Connection, digest: str) -> Family | None:
    row = connection.execute(select(_T).where(_T.c.digest == digest)).one_or_none()
    return None if row is None else _family(row)


def _family(row: Row[tuple[object, ...]]) -> Family:
    return Family(row.digest, row.name, parse_header(row.header), row.source, row.created_at)
