"""Staging: a worker's private, immutable copy of every validated tenant.

After an eviction, exactly what was validated is loaded again, even if the tenant's own directory
has changed or is gone: an error there would occur inside the engine's step and end the engine. Each
worker owns its copies, and removes those of workers that died.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import IO

from safegene_vllm.errors import AdapterRejectedError, SafegeneError
from safegene_vllm.formats.directory_tree import is_snapshot, open_file
from safegene_vllm.formats.tenant_directory import reject_exported
from safegene_vllm.formats.tenant_kind import SlotKind, slot_kind

PROFILE_FILE = "safegene.json"
REQUIRED_FILES: Mapping[SlotKind, Sequence[str]] = {
    "adapter": ("adapter_config.json", "adapter_model.safetensors"),
    "profile": (PROFILE_FILE,),
}
FILES: Mapping[SlotKind, Sequence[str]] = {
    "adapter": (*REQUIRED_FILES["adapter"], PROFILE_FILE),
    "profile": REQUIRED_FILES["profile"],
}
_PREFIX = "safegene-worker-"


class Links(Enum):
    """Symbolic links that are followed in a tenant's directory."""

    ANY = "any"
    NONE = "none"
    CACHED = "into the blobs of its own Hugging Face cache"


@dataclass(frozen=True)
class Staged:
    """One copy: its directory, and the SHA-256 of every file in it, by name."""

    directory: Path
    digests: Mapping[str, str]


@dataclass(frozen=True)
class _File:
    """Identity of a file independent of its name."""

    device: int
    inode: int
    size_bytes: int
    modified_ns: int


class Staging:
    """Copies of one worker process, removed with it.

    The registry's store gives all revisions of a tenant hard links to one read-only weights file;
    staging does the same, so a revision that only changes coefficients costs a link.
    """

    def __init__(self, parent: Path | None) -> None:
        parent = Path(tempfile.gettempdir()) if parent is None else parent
        parent.mkdir(parents=True, exist_ok=True)
        _remove_orphans(parent)
        self._directory = tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=parent)
        weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)
        self._known: dict[_File, tuple[Path, str]] = {}

    def copy(self, source: Path, name: str, roots: Sequence[Path]) -> Staged:
        """Copy the files of a tenant, after checking what its directory is (`slot_kind`).

        Errors: those of `slot_kind`; AdapterRejectedError (not below `roots`, through a symlink,
        unreadable, exported, changing while it is copied).
        """
        source = allowed(source, roots)
        links = _links(source, roots)
        try:
            kind = slot_kind(source)
            if (source / PROFILE_FILE).exists():
                reject_exported(source)
        except SafegeneError as error:
            raise type(error)(f"tenant {name!r}: {error}") from error
        target = Path(tempfile.mkdtemp(prefix="tenant-", dir=self._directory))
        try:
            found = {
                f: digest
                for f in FILES[kind]
                if (digest := self._take(source / f, target / f, links))
            }
        except OSError as error:
            shutil.rmtree(target)
            raise AdapterRejectedError(
                f"tenant {name!r}: {source} cannot be read ({error}); give a readable directory of "
                "plain files."
            ) from error
        missing = [f for f in REQUIRED_FILES[kind] if f not in found]
        if missing:
            shutil.rmtree(target)
            raise AdapterRejectedError(
                f"tenant {name!r}: {source} lost {', '.join(missing)} while it was read; load "
                "it again once nothing writes there."
            )
        return Staged(target, found)

    def _take(self, source: Path, target: Path, links: Links) -> str | None:
        """Copy or link a file if it exists; return its digest."""
        try:
            handle = _open(source, links)
        except FileNotFoundError:
            return None
        with os.fdopen(handle, "rb") as stream:
            about = os.fstat(stream.fileno())
            digest = self._linked(about, target) or _copied(stream, target)
            if _shared(about):
                self._known[_file_of(about)] = (target, digest)
            return digest

    def _linked(self, about: os.stat_result, target: Path) -> str | None:
        """Link a file that was copied before; return its digest, or None if it was not."""
        copy, digest = self._known.get(_file_of(about), (None, None))
        if copy is None or not _shared(about):
            return None
        try:
            os.link(copy, target)
        except FileNotFoundError:
            return None
        return digest

    def drop(self, directory: Path) -> None:
        """Remove one copy."""
        shutil.rmtree(directory, ignore_errors=True)


def check_readable(source: Path, roots: Sequence[Path]) -> Path:
    """Check that a worker will be able to stage a tenant's directory; return its path.

    Errors: those of `slot_kind` and `allowed`; AdapterRejectedError for a file that cannot be read.
    """
    source = allowed(source, roots)
    for file in FILES[slot_kind(source)]:
        try:
            os.close(_open(source / file, _links(source, roots)))
        except FileNotFoundError:
            continue
        except OSError as error:
            raise AdapterRejectedError(
                f"{source / file} cannot be read ({error.strerror or error}); with "
                "safegene.adapter_roots set, a symbolic link is followed only from a snapshot of a "
                "Hugging Face cache into its blobs."
            ) from error
    return source


def allowed(source: Path, roots: Sequence[Path]) -> Path:
    """Return the normalized path of `source`, checked to be below one of `roots` (if any).

    Errors: AdapterRejectedError if it is elsewhere, or reached through a symbolic link.
    """
    if not roots:
        return source
    plain = Path(os.path.normpath(source.absolute()))
    for top in _tops(plain, roots):
        _no_links(top, plain)
        return plain
    shown = ", ".join(str(r) for r in roots)
    raise AdapterRejectedError(
        f"adapter path {source} is outside safegene.adapter_roots ({shown}); move the adapter "
        "below one of them or add its root."
    )


def _tops(plain: Path, roots: Sequence[Path]) -> list[Path]:
    """Return the roots that `plain` is below, under the name that it has there."""
    names = [top for root in roots for top in (root.absolute(), root.resolve())]
    return [top for top in names if plain.is_relative_to(top)]


def _links(source: Path, roots: Sequence[Path]) -> Links:
    """Return the links that may be followed in an allowed directory."""
    if not roots:
        return Links.ANY
    cached = any(is_snapshot(source, top) for top in _tops(source, roots))
    return Links.CACHED if cached else Links.NONE


def _open(path: Path, links: Links) -> int:
    """Open a plain file for reading; with no roots, through any link. Errors: OSError."""
    if links is Links.ANY:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        if stat.S_ISREG(os.fstat(handle).st_mode):
            return handle
        os.close(handle)
        raise OSError(f"{path.name} is not a plain file")
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        return open_file(directory, path.name, cached=links is Links.CACHED)
    finally:
        os.close(directory)


def _no_links(top: Path, plain: Path) -> None:
    """Errors: AdapterRejectedError if any step from `top` down to `plain` is a symbolic link."""
    step = top
    for part in plain.relative_to(top).parts:
        step = step / part
        if step.is_symlink():
            raise AdapterRejectedError(
                f"adapter path {plain} goes through the symbolic link {step}; with "
                "safegene.adapter_roots set, adapters must be plain directories below them."
            )


def _file_of(about: os.stat_result) -> _File:
    return _File(about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)


def _shared(about: os.stat_result) -> bool:
    """Return whether it is a read-only file with several names, as in the registry's store."""
    return about.st_nlink > 1 and not about.st_mode & 0o222


def _copied(stream: IO[bytes], target: Path) -> str:
    """Copy the rest of `stream`; return its SHA-256."""
    digest = hashlib.sha256()
    with target.open("wb") as out:
        while block := stream.read(1 << 20):
            digest.update(block)
            out.write(block)
    target.chmod(0o400)
    return digest.hexdigest()


def _remove_orphans(parent: Path) -> None:
    """Delete the copies of workers that were killed."""
    for leftover in parent.glob(f"{_PREFIX}*"):
        pid = leftover.name.removeprefix(_PREFIX).split("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            shutil.rmtree(leftover, ignore_errors=True)
