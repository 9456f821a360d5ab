"""Directories of a store: names, locks, and atomic installation.

A store is shared by the processes of one machine. Work happens in private directories below
`incoming/`, and becomes visible by one rename under the store's lock. A killed process leaves only
a private directory, which is never read and whose released lock marks it for removal.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safegene_vllm.errors import DigestError, StoreError
from safegene_vllm.formats.file_io import digest_of
from safegene_vllm.formats.metadata import is_digest

ADAPTERS, REVISIONS, INCOMING = "adapters", "revisions", "incoming"
_LOCK = "lock"
_NO_LINKS_HERE = (errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV)


def hexadecimal(digest: str) -> str:
    """The 64 digits of a digest; DigestError for anything else, so that no path can be smuggled."""
    if not is_digest(digest):
        raise DigestError(f"{digest!r} is not sha256:<64 hex digits>; give a digest of this store.")
    return digest.removeprefix("sha256:")


def revision_name(adapter_digest: str | None, profile_digest: str) -> str:
    """The directory name of a revision; `none` stands for the base model."""
    adapter = "none" if adapter_digest is None else hexadecimal(adapter_digest)
    return f"{adapter}-{hexadecimal(profile_digest)}"


def adapter_digest_of(hashes: Mapping[str, str]) -> str:
    """The identity of an adapter: `sha256:<hex>` over its files' names and hashes."""
    return digest_of({"adapter": dict(hashes)}, "adapter")


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def store_errors(place: Path) -> Iterator[None]:
    """Raise OSError of the store's own disk as StoreError."""
    try:
        yield
    except OSError as error:
        hint = "free some space" if error.errno == errno.ENOSPC else "check the disk and its rights"
        why = f"cannot be written or read ({error.strerror or type(error).__name__}); {hint}"
        raise StoreError(
            f"{place} {why} and try again.", public=f"this server's store {why} and try again."
        ) from error


def make_root(root: Path) -> None:
    """Make the directories of a store, for this user alone, and clear what dead processes left."""
    with store_errors(root):
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in (ADAPTERS, REVISIONS, INCOMING):
            (root / name).mkdir(exist_ok=True)
    sweep(root)


@contextmanager
def locked(root: Path, *, shared: bool = False) -> Iterator[None]:
    """Lock of the store, between threads and processes; a killed process releases it.

    Not reentrant. Errors: StoreError, also for what the body's file operations raise.
    """
    with store_errors(root):
        descriptor = os.open(root / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
            try:
                yield
            finally:
                # Explicit: a fork of another thread may hold a copy of the descriptor.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
        finally:
            os.close(descriptor)


@contextmanager
def workspace(root: Path) -> Iterator[Path]:
    """Private directory below `incoming/`, deleted afterwards; do not enter it with `locked`."""
    # Under the store's lock, so that no sweep can come between making and locking.
    with locked(root, shared=True):
        path = Path(tempfile.mkdtemp(dir=root / INCOMING))
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def sweep(root: Path) -> None:
    """Delete the private directories of processes that have ended."""
    with locked(root):
        for path in list((root / INCOMING).iterdir()):
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            except (FileNotFoundError, NotADirectoryError):
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            else:
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def install(fresh: Path, target: Path, aside: Path) -> None:
    """Rename the complete directory `fresh` to `target`; a former `target` is moved to `aside`.

    Under the store's lock. On a crash in between there is no `target`, never half of one.
    """
    os.utime(fresh)
    sync_directory(fresh)
    if target.exists():
        os.rename(target, aside)
    os.rename(fresh, target)
    sync_directory(target.parent)


def link(source: Path, target: Path) -> None:
    """Hard-link a file; copy it where the file system allows no link."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS_HERE:
            raise
        shutil.copyfile(source, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())
        target.chmod(0o444)
