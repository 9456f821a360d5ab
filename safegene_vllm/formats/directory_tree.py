"""Names in a directory, at any depth, without following a symbolic link out of it. Torch-free.

Lists a directory before anything in it is read. Remote directories are listed by the server.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, Protocol

from safegene_vllm.errors import AdapterRejectedError, MissingFileError

_BLOBS = "../../blobs"
_BLOB = re.compile(rf"{re.escape(_BLOBS)}/([0-9a-f]{{40}}|[0-9a-f]{{64}})")
"""Links of a snapshot in the Hugging Face cache: `snapshots/REVISION/NAME` to `blobs/DIGEST`."""


@dataclass(frozen=True)
class Entry:
    """A name in a directory.

    `form` is "unseen" for what exists and cannot be listed or followed; `target` is the target of a
    symbolic link, as written.
    """

    name: str
    form: Literal["file", "directory", "unseen"]
    target: str = ""


class Tree(Protocol):
    """A directory, local or remote, of which names are listed; `shown` names it in messages."""

    @property
    def shown(self) -> str: ...

    def has(self, name: str) -> bool:
        """Whether the directory itself has this name. Errors: SafegeneError if unreadable."""

    def entries(self, below: str, limit: int) -> Sequence[Entry]:
        """At most `limit` names in the subdirectory `below` ("" for the directory itself).

        Errors: SafegeneError if it cannot be listed.
        """


@dataclass(frozen=True)
class LocalTree:
    """A directory of this machine; a symbolic link is followed to it and nowhere below it."""

    directory: Path

    @property
    def shown(self) -> str:
        return str(self.directory)

    def has(self, name: str) -> bool:
        with self._opened() as descriptor:
            return has_name(descriptor, name)

    def entries(self, below: str, limit: int) -> Sequence[Entry]:
        with self._opened(below) as descriptor:
            return list_names(descriptor, below, limit)

    @contextmanager
    def _opened(self, below: str = "") -> Iterator[int]:
        """A descriptor of the directory itself; errors name `below` it.

        Errors: MissingFileError; AdapterRejectedError for all else that the operating system says.
        """
        try:
            descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MissingFileError(
                f"{self.directory} is not a directory; check the path"
            ) from error
        except (OSError, ValueError) as error:
            raise self._unreadable("", error) from error
        try:
            yield descriptor
        except OSError as error:
            raise self._unreadable(below, error) from error
        finally:
            os.close(descriptor)

    def _unreadable(self, below: str, error: Exception) -> AdapterRejectedError:
        reason = getattr(error, "strerror", None) or error
        return AdapterRejectedError(
            f"{self.directory / below} cannot be read ({reason}), so it cannot be seen what is in "
            "it; give a readable directory."
        )


def has_name(descriptor: int, name: str) -> bool:
    """Whether an open directory has this name, whatever it is (a dangling link counts).

    Errors: OSError.
    """
    try:
        os.stat(name, dir_fd=descriptor, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def list_names(descriptor: int, below: str, limit: int) -> list[Entry]:
    """At most `limit` names in `below` an open directory, reached without following a link.

    Errors: OSError.
    """
    handle = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=descriptor)
    try:
        for part in below.split("/") if below else ():
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
            deeper = os.open(part, flags, dir_fd=handle)
            os.close(handle)
            handle = deeper
        with os.scandir(handle) as found:
            return [_entry(entry, handle, below) for entry in islice(found, limit)]
    finally:
        os.close(handle)


def open_file(descriptor: int, name: str, *, cached: bool) -> int:
    """Open a regular file of an open directory for reading, without following a link.

    `cached`: the directory is a snapshot of a Hugging Face cache (see `is_snapshot`); a link into
    the blobs of the same repository is followed, which holds no other links.
    Errors: OSError, ELOOP for any other link, EINVAL if it is not a regular file.
    """
    # A FIFO must not block.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW
    try:
        found = os.open(name, flags, dir_fd=descriptor)
    except OSError as error:
        blob = _BLOB.fullmatch(_link_of(descriptor, name)) if error.errno == errno.ELOOP else None
        if blob is None or not cached:
            raise
        folder = os.open(_BLOBS, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
        try:
            found = os.open(blob[1], flags, dir_fd=folder)
        finally:
            os.close(folder)
    if not stat.S_ISREG(os.fstat(found).st_mode):
        os.close(found)
        raise OSError(errno.EINVAL, f"{name} is not a plain file")
    return found


def _link_of(descriptor: int, name: str) -> str:
    try:
        return os.readlink(name, dir_fd=descriptor)
    except OSError:
        return ""


def is_snapshot(directory: Path, top: Path) -> bool:
    """Return whether this is REPOSITORY/snapshots/REVISION, with REPOSITORY `top` or below it."""
    parts = directory.relative_to(top).parts
    return len(parts) >= 2 and parts[-2] == "snapshots"


def _entry(entry: os.DirEntry[str], handle: int, below: str) -> Entry:
    if not entry.is_symlink():
        return Entry(entry.name, "directory" if entry.is_dir(follow_symlinks=False) else "file")
    target = os.readlink(entry.name, dir_fd=handle)
    if _leads_inside(below, target):
        # What it leads to is listed under its own name.
        return Entry(entry.name, "file", target)
    try:
        mode = os.stat(entry.name, dir_fd=handle).st_mode
    except OSError:
        mode = 0
    return Entry(entry.name, "file" if stat.S_ISREG(mode) else "unseen", target)


def _leads_inside(below: str, target: str) -> bool:
    """Whether a link in the subdirectory `below` cannot lead out of the top directory.

    By its text alone, so only if no `..` follows a name: that name may be a link itself. A link on
    its way is an entry of its own, and is judged there.
    """
    if target.startswith("/"):
        return False
    depth = below.count("/") + 1 if below else 0
    parts = [part for part in target.split("/") if part not in ("", ".")]
    while parts and parts[0] == "..":
        depth -= 1
        parts.pop(0)
    return depth >= 0 and ".." not in parts
