"""Integrity checks of stored directories: missing, incomplete, altered. No repairs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from safegene_server.artifacts.layout import adapter_digest_of, hash_file
from safegene_vllm.errors import DigestError, FormatError, MissingFileError
from safegene_vllm.formats.adapter import CONFIG_FILE, WEIGHTS_FILE
from safegene_vllm.formats.metadata import DESCRIPTION_FILE
from safegene_vllm.formats.profile import load_profile

ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE)


def adapter_damage(path: Path, digest: str) -> FormatError | None:
    """None if `path` holds exactly the adapter of this digest; reads all of it."""
    return _names_damage(path, ADAPTER_FILES) or _content_damage(path, digest)


def revision_damage(
    path: Path, adapter_digest: str | None, profile_digest: str, *, trusted: Path | None = None
) -> FormatError | None:
    """None if `path` holds exactly this adapter and this profile.

    Files that are one and the same with those in `trusted`, the adapter's own directory, are not
    read again.
    """
    adapter_files = () if adapter_digest is None else ADAPTER_FILES
    if damage := _names_damage(path, (*adapter_files, DESCRIPTION_FILE)):
        return damage
    try:
        found = load_profile(path).digest
    except FormatError as error:
        return error
    if found != profile_digest:
        return DigestError(f"{path} holds profile {found}, expected {profile_digest}.")
    if adapter_digest is None or (trusted is not None and _same_files(path, trusted)):
        return None
    return _content_damage(path, adapter_digest)


def _names_damage(path: Path, expected: Iterable[str]) -> FormatError | None:
    if not path.is_dir():
        return MissingFileError(f"{path} is not there; stage the source again.")
    found = {entry.name for entry in path.iterdir()}
    if found != set(expected):
        return DigestError(
            f"{path} holds {', '.join(sorted(found)) or 'nothing'}, expected "
            f"{', '.join(sorted(expected))}; stage the source again."
        )
    return None


def _content_damage(path: Path, digest: str) -> FormatError | None:
    found = adapter_digest_of({name: hash_file(path / name) for name in ADAPTER_FILES})
    if found == digest:
        return None
    return DigestError(
        f"the adapter in {path} has digest {found}, expected {digest}; it was altered on this "
        "disk: stage the source again."
    )


def _same_files(path: Path, trusted: Path) -> bool:
    try:
        return all(os.path.samefile(path / name, trusted / name) for name in ADAPTER_FILES)
    except FileNotFoundError:
        return False
