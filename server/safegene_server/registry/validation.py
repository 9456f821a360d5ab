"""Validation of names, digests, scopes and limits before they reach the database.

Every error is a RegistryError that says what was found and what is expected.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from safegene_server.tenant_names import tenant_name_error
from safegene_vllm.errors import RegistryError

SCOPES = ("admin", "read", "serve")
LIMITS = ("concurrent", "requests_per_minute", "tokens_per_minute")
ANY_TENANT = "*"
BASE = "base"
"""Entry of a key's tenants for the base model itself; no tenant may have this name."""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_LINE = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]+")
_MAX_INT = 2**31 - 1


def tenant_name(value: str) -> str:
    """`value` if a tenant may have this name. Errors: RegistryError."""
    if error := tenant_name_error(value):
        raise RegistryError(error)
    if value == BASE:
        raise RegistryError(f"tenant name {value!r} is reserved for the base model; choose another")
    return value


def served_name(tenant: str, number: int) -> str:
    """`tenant@N`, the name under which a revision is served."""
    return f"{tenant}@{number}"


def revision_number(value: int) -> int:
    """Check a revision number. Errors: RegistryError."""
    if type(value) is not int or not 1 <= value <= _MAX_INT:
        raise RegistryError(f"revision number {value!r}: expected a whole number from 1")
    return value


def digest(value: str, what: str) -> str:
    """Check a SHA-256 digest. Errors: RegistryError."""
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise RegistryError(f"{what} {value!r:.200} is not sha256:<64 hex digits>")
    return value


def line(value: str, what: str, max_length: int = 200) -> str:
    """Check one line of text. Errors: RegistryError."""
    if not isinstance(value, str) or len(value) > max_length or not _LINE.fullmatch(value):
        raise RegistryError(
            f"{what} {value!r:.200}: expected one line of 1 to {max_length} characters"
        )
    return value


def scopes(values: Iterable[str]) -> list[str]:
    """Check and sort the scopes of a key. Errors: RegistryError."""
    found = sorted(set(values))
    unknown = [value for value in found if value not in SCOPES]
    if unknown or not found:
        raise RegistryError(f"scopes {found}: expected one or more of {', '.join(SCOPES)}")
    return found


def key_tenants(values: Iterable[str], default: str | None) -> list[str]:
    """Check and sort the tenants of a key, which include `default`. Errors: RegistryError."""
    found = sorted(set(values))
    for value in found:
        if value not in (ANY_TENANT, BASE):
            tenant_name(value)
    if default is not None and ANY_TENANT not in found and tenant_name(default) not in found:
        raise RegistryError(
            f"default_tenant {default!r} is not among the key's tenants {found}; add it there"
        )
    return found


def limits(values: Mapping[str, Any]) -> dict[str, int]:
    """Check the limits of a tenant. Errors: RegistryError naming every invalid one."""
    invalid = [
        f"{name} = {value!r}"
        for name, value in values.items()
        if name not in LIMITS or type(value) is not int or not 1 <= value <= _MAX_INT
    ]
    if invalid:
        raise RegistryError(
            f"limits {', '.join(invalid)}: expected whole numbers from 1 for {', '.join(LIMITS)}; "
            "leave out the unlimited ones"
        )
    return dict(values)


def text(value: str) -> str:
    """Replace characters that a database cannot store, in a message from elsewhere."""
    return value.encode("utf-8", "replace").decode("utf-8").replace("\x00", "?")


def plain(value: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Copy `value` through JSON. Errors: RegistryError if it is not plain JSON."""
    try:
        copy = json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise RegistryError(f"{what} is not plain JSON: {error}") from error
    found: dict[str, Any] = copy
    return found
