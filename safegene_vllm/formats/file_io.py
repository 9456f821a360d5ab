"""Reading and writing files: strict JSON, canonical JSON, atomic writes. Torch-free."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from safegene_vllm.errors import FormatError, HeaderError, MissingFileError, NonFiniteError

JSON_LIMIT_BYTES = 64_000_000
"""Far above any description; a larger file is rejected before it is read."""


def size_of_regular_file(path: Path) -> int:
    """Size in bytes of `path`, a regular file or a link to one (a FIFO would block)."""
    try:
        status = path.stat()
    except OSError as error:
        raise MissingFileError(
            f"{path} cannot be read ({error.strerror}); check the path and its permissions"
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise MissingFileError(f"{path} is not a regular file; expected a file")
    return status.st_size


def _no_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise HeaderError(f"key {key[:100]!r} occurs twice in one object; keep one of them")
        result[key] = value
    return result


def _no_constant(text: str) -> NoReturn:
    raise NonFiniteError(f"{text} found; only finite numbers are allowed")


def _finite_float(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_constant(text)


def _short_int(text: str) -> int:
    # Longer ones fit no 64-bit reader, and float() of a huge one overflows.
    if len(text) > 20:
        raise HeaderError(
            f"whole number {text[:20]}... has {len(text)} digits, expected at most 20"
        )
    return int(text)


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `data`: UTF-8, no duplicate keys, finite numbers only.

    Errors: HeaderError, NonFiniteError; both name `where`.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_constant=_no_constant,
            parse_float=_finite_float,
            parse_int=_short_int,
        )
    except (HeaderError, NonFiniteError) as error:
        raise type(error)(f"{where}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"{where}: expected one JSON object in UTF-8, found: {error}") from error
    if not isinstance(value, dict):
        raise HeaderError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def read_json(path: Path, limit_bytes: int | None = None) -> dict[str, Any]:
    """The JSON object in the file `path`, of JSON_LIMIT_BYTES at most if no limit is given.

    Errors: those of `parse_json`, MissingFileError.
    """
    size_bytes = size_of_regular_file(path)
    limit_bytes = JSON_LIMIT_BYTES if limit_bytes is None else limit_bytes
    if size_bytes > limit_bytes:
        raise HeaderError(f"{path} has {size_bytes} bytes, expected at most {limit_bytes}")
    return parse_json(path.read_bytes(), str(path))


def canonical_json(value: Any, where: str) -> bytes:
    """The one way to write `value`: sorted keys, no spaces, ASCII, shortest floats, no NaN."""
    try:
        text = json.dumps(
            value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
        )
    except ValueError as error:
        raise NonFiniteError(f"{where}: {error}; only finite numbers are allowed") from error
    except (TypeError, RecursionError) as error:
        raise HeaderError(f"{where}: expected plain JSON values, found: {error}") from error
    return text.encode("ascii")


def plain_json(value: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A deep copy of `value` exactly as a reader of its JSON will see it (tuples become lists)."""
    return parse_json(canonical_json(dict(value), where), where)


def digest_of(value: Any, where: str) -> str:
    """`sha256:<hex>` of the canonical JSON of `value`."""
    return "sha256:" + hashlib.sha256(canonical_json(value, where)).hexdigest()


def pretty_json(value: Mapping[str, Any]) -> bytes:
    """`value` for people and for the disk: keys in the given order, two spaces, a final newline."""
    return (json.dumps(value, indent=2, ensure_ascii=True, allow_nan=False) + "\n").encode("ascii")


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Write `path` as a whole or not at all: a temporary sibling, fsync, rename.

    A link is replaced by the file, never written through: it may lead to a file that others share,
    such as a blob of the Hugging Face cache.
    """
    path = Path(os.path.realpath(path.parent)) / path.name
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new-{secrets.token_hex(8)}")
    try:
        _write_synced(fresh, data)
        os.replace(fresh, path)
        _sync_directory(path.parent)
    finally:
        fresh.unlink(missing_ok=True)


def replace_directory(path: Path, files: Mapping[str, bytes], *, owned: Iterable[str]) -> None:
    """Make `path` a directory of exactly `files`: written aside, synced, renamed.

    An existing directory is replaced as a whole, never mixed with the new one; readers see the old
    one, for an instant none, then the new one. It is rejected (FormatError) if it holds a name that
    is not in `owned`, because the swap would delete that file.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    exists = os.path.lexists(path)
    if exists:
        if not path.is_dir():
            raise FormatError(f"{path} is a file; save to a directory")
        others = sorted({entry.name for entry in path.iterdir()} - set(owned))
        if others:
            raise FormatError(
                f"{path} also holds {', '.join(others[:5])}, which saving here would delete; "
                "move them away or save to a new directory"
            )
    token = secrets.token_hex(8)
    fresh, aside = (path.with_name(f".{path.name}.{what}-{token}") for what in ("new", "old"))
    try:
        fresh.mkdir()
        for name, data in files.items():
            _write_synced(fresh / name, data)
        _sync_directory(fresh)
        if exists:
            os.rename(path, aside)
        try:
            os.replace(fresh, path)
        except BaseException:
            if exists:
                os.rename(aside, path)
            raise
        _sync_directory(path.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    # Only now: had the way back failed too, `aside` would be the one good copy.
    shutil.rmtree(aside, ignore_errors=True)
