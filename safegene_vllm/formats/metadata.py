"""safegene.json: the fields that descriptions of families and profiles share.

Kind, format version, known fields with their JSON types, and keys beginning with `x_`, which are
for people: allowed, ignored, not covered by the digest. Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safegene_vllm.errors import HeaderError, SafegeneError, VersionError, raise_errors
from safegene_vllm.formats.file_io import read_json

DESCRIPTION_FILE = "safegene.json"
FORMAT_VERSION = 1
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_JSON_NAMES = {dict: "an object", list: "a list", str: "text", int: "a whole number"}


def is_digest(value: Any) -> bool:
    """Whether `value` is written `sha256:` and 64 lower-case hexadecimal digits."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def is_number(value: Any) -> bool:
    """Whether `value` is a JSON number (true and false are not)."""
    return type(value) in (int, float)


def field_errors(where: str, raw: Mapping[str, Any], fields: Mapping[str, type]) -> list[str]:
    """Messages for the fields of `raw` that are unknown, missing or of another JSON type."""
    known = set(fields)
    unknown = sorted(key for key in raw if key not in known and not key.startswith("x_"))
    errors = [f"{where}: unknown field {key!r}; own fields must begin with 'x_'" for key in unknown]
    for key, kind in fields.items():
        if key not in raw:
            errors.append(f"{where}: field {key!r} is missing, expected {_JSON_NAMES[kind]}")
        elif type(raw[key]) is not kind:
            errors.append(f"{where}: {key} is {raw[key]!r:.80}, expected {_JSON_NAMES[kind]}")
    return errors


def read_description(path: Path, kind: str, fields: Mapping[str, type]) -> dict[str, Any]:
    """The description in `path` without kind, format version and `x_` keys; types checked.

    Errors: MissingFileError, HeaderError, NonFiniteError; VersionError for another format version.
    """
    return check_description(read_json(path), kind, fields, str(path))


def check_description(
    raw: Mapping[str, Any], kind: str, fields: Mapping[str, type], where: str
) -> dict[str, Any]:
    """`raw` without kind, format version and `x_` keys; types checked. Errors name `where`.

    Errors: HeaderError; VersionError for another format version.
    """
    if raw.get("kind") != kind:
        raise HeaderError(f"{where}: kind is {raw.get('kind')!r}, expected {kind!r}")
    version = raw.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise VersionError(
            f"{where}: format_version is {version!r}, this release reads {FORMAT_VERSION}; "
            "use a matching release of safegene-vllm"
        )
    types = {"kind": str, "format_version": int, "digest": str, **fields}
    errors: list[SafegeneError] = [HeaderError(f) for f in field_errors(where, raw, types)]
    if isinstance(raw.get("digest"), str) and not is_digest(raw["digest"]):
        errors.append(
            HeaderError(f"{where}: digest {raw['digest']!r} is not sha256:<64 hex digits>")
        )
    raise_errors(errors)
    return {key: raw[key] for key in (*fields, "digest")}
