"""Checks of fetched files against a family, and of stored directories against their digests.

Fetched files: headers, shapes, dtypes, layers, NaN, the profile, as far as they need no torch. The
workers check again what they load; the model's behavior is checked by the smoke test. Stored
directories: missing, incomplete, altered.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from safegene_server.artifacts.layout import adapter_digest_of, hash_file
from safegene_vllm.errors import (
    DigestError,
    FormatError,
    MissingFileError,
    SafegeneError,
    raise_errors,
)
from safegene_vllm.formats.adapter import CONFIG_FILE, WEIGHTS_FILE
from safegene_vllm.formats.family import FamilyHeader
from safegene_vllm.formats.metadata import DESCRIPTION_FILE
from safegene_vllm.formats.profile import Profile, check_profile, has_profile, load_profile
from safegene_vllm.formats.safetensors_file import check_finite
from safegene_vllm.formats.tenant_directory import check_fits

ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE)


def check_tenant_files(directory: Path, family: FamilyHeader, shown: str) -> Profile | None:
    """The profile that came with the adapter (None without one), after all checks passed.

    Messages name `shown`, the source as given, not the local copy. All errors in one message.
    Errors: FormatError, FamilyMismatchError, BoundsError, AdapterRejectedError.
    """
    found: list[Profile] = []

    def profile() -> None:
        found.append(load_profile(directory))
        check_profile(found[0], family)

    steps: list[Callable[[], None]] = [lambda: check_fits(directory, family)]
    if (directory / WEIGHTS_FILE).exists():
        steps.append(lambda: check_finite(directory / WEIGHTS_FILE))
    if has_profile(directory):
        steps.append(profile)
    errors: list[SafegeneError] = []
    for step in steps:
        try:
            step()
        except SafegeneError as error:
            renamed = type(error)(str(error).replace(str(directory), shown))
            if str(renamed) not in map(str, errors):
                errors.append(renamed)
    raise_errors(errors)
    return found[0] if found else None


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
