"""A tenant's source opened for reading: a local directory, or a remote one through fsspec.

Rejects what may not be read: outside the roots, through a symbolic link, an unknown protocol.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import fsspec

from safegene_server.error_responses import names_path
from safegene_vllm.errors import (
    AdapterRejectedError,
    ConfigError,
    MissingFileError,
    SafegeneError,
    SourceError,
)
from safegene_vllm.formats.directory_tree import (
    Entry,
    has_name,
    is_snapshot,
    list_names,
    open_file,
)

CHUNK_BYTES = 1 << 23
REMOTE = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "https")
"""Protocols that are read unless a deployment says otherwise; `http` must be allowed explicitly."""

_DRIVERS = {
    **dict.fromkeys(("s3", "s3a"), "'safegene-vllm[s3]'"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "adlfs"),
    "hf": "huggingface_hub",
    "https": "aiohttp",
}
"""What pip installs for a protocol."""
_URL = re.compile(r"(?P<protocol>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>.*)", re.DOTALL)
_AT_IS_NO_USER = ("abfs", "abfss", "az")
_STAMPS = (
    *("ETag", "etag", "LastModified", "last_modified", "Last-Modified", "mtime", "updated"),
    *("created", "generation", "VersionId", "version_id", "md5Hash", "content_md5", "blob_id"),
    *("Content-MD5", "Digest"),
)


@dataclass(frozen=True)
class SourceRules:
    """What may be read. `roots`: local directories, none means any; `options` by protocol.

    `options` go to fsspec as they are (credentials, endpoint) and are never shown.
    """

    roots: tuple[Path, ...] = ()
    protocols: tuple[str, ...] = REMOTE
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Seen:
    """State of one file: equal before and after reading unless it was written to."""

    size_bytes: int | None
    stamp: tuple[str, ...]


class Source(Protocol):
    """A directory of which files are read by name; a `directory_tree.Tree`."""

    @property
    def shown(self) -> str: ...

    def has(self, name: str) -> bool:
        """Whether there is such a file. Errors: as `stat`."""

    def entries(self, below: str, limit: int) -> Sequence[Entry]:
        """As `Tree.entries`. Errors: SourceError."""

    def stat(self, name: str) -> Seen | None:
        """None if there is no such file. Errors: SourceError, AdapterRejectedError (a link)."""

    def chunks(self, name: str) -> Iterator[bytes]:
        """The content, piece by piece. Errors: as `stat`."""


@dataclass(frozen=True)
class LocalSource:
    """An open directory: it stays the same one, whatever happens to its path meanwhile.

    `cached`: it is a snapshot of a Hugging Face cache, whose links lead to its blobs.
    """

    shown: str
    descriptor: int
    cached: bool = False

    def has(self, name: str) -> bool:
        return self.stat(name) is not None

    def entries(self, below: str, limit: int) -> Sequence[Entry]:
        try:
            return list_names(self.descriptor, below, limit)
        except OSError as error:
            raise _unreadable(f"{self.shown}/{below}", error) from error

    def stat(self, name: str) -> Seen | None:
        if not has_name(self.descriptor, name):
            return None
        handle = self._open(name)
        try:
            status = os.fstat(handle)
        finally:
            os.close(handle)
        marks = (status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
        return Seen(status.st_size, tuple(map(str, marks)))

    def chunks(self, name: str) -> Iterator[bytes]:
        try:
            with open(self._open(name), "rb", buffering=0) as file:
                while data := file.read(CHUNK_BYTES):
                    yield data
        except OSError as error:
            raise _unreadable(f"{self.shown}/{name}", error) from error

    def _open(self, name: str) -> int:
        where = f"{self.shown}/{name}"
        try:
            return open_file(self.descriptor, name, cached=self.cached)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise _is_link(where) from error
            if error.errno == errno.EINVAL:
                raise _not_plain(where) from error
            raise _unreadable(where, error) from error


@dataclass(frozen=True)
class RemoteSource:
    """A directory (or key prefix) on a file system of fsspec."""

    shown: str
    system: Any
    path: str

    def has(self, name: str) -> bool:
        return self.stat(name) is not None

    def entries(self, below: str, limit: int) -> Sequence[Entry]:
        """Drivers list whole directories, so `limit` bounds what is looked at, not what is sent."""
        inside = f"{self.path}/{below}" if below else self.path
        try:
            listed = self.system.ls(inside, detail=True)
        except FileNotFoundError as error:
            # An object store has no directories, so nothing is there; an HTTP server may just not
            # list what it gives.
            if not below and not self.shown.startswith("http"):
                return []
            raise _unreadable(f"{self.shown}/{below}", error) from error
        except Exception as error:
            raise _unreadable(f"{self.shown}/{below}", error) from error
        return list(islice(self._entries(inside, listed), limit))

    def _entries(self, inside: str, listed: Iterable[Mapping[str, Any]]) -> Iterator[Entry]:
        for info in listed:
            path, is_directory = str(info["name"]), info.get("type") == "directory"
            if self.shown.startswith("http") and not path.startswith(f"{inside}/"):
                continue  # A page links to other places too.
            if path.strip("/") == inside.strip("/"):
                # A file of this name is the mark that some tools leave for a directory; a directory
                # of it (`acme//x`) has an empty name, which cannot be listed.
                if is_directory:
                    yield Entry("", "unseen")
                continue
            name = path.rstrip("/").rpartition("/")[2]
            yield Entry(name, "directory" if is_directory else "file")

    def stat(self, name: str) -> Seen | None:
        try:
            info = self.system.info(f"{self.path}/{name}")
        except FileNotFoundError as error:
            # fsspec's HTTP file system calls every failure "not found"; its cause differs.
            cause = error.__cause__
            if self.shown.startswith("http") and getattr(cause, "status", None) not in (404, 410):
                raise _unreadable(f"{self.shown}/{name}", cause or error) from error
            return None
        except Exception as error:
            # Drivers raise what their client library raises; no common class.
            raise _unreadable(f"{self.shown}/{name}", error) from error
        if info.get("type", "file") != "file":
            return None
        size = info.get("size")
        stamp = tuple(f"{key}={info[key]}" for key in _STAMPS if info.get(key) is not None)
        return Seen(size if type(size) is int else None, (*stamp, str(size)))

    def chunks(self, name: str) -> Iterator[bytes]:
        where = f"{self.path}/{name}"
        try:
            with self.system.open(where, "rb", block_size=CHUNK_BYTES, cache_type="none") as file:
                while data := file.read(CHUNK_BYTES):
                    yield data
        except Exception as error:
            raise _unreadable(f"{self.shown}/{name}", error) from error


@contextmanager
def naming_source() -> Iterator[None]:
    """Make the messages of errors public: they name the source as given, and no other path."""
    try:
        yield
    except SafegeneError as error:
        if error.public is None:
            error.public = str(error)
        raise


def _unreadable(where: str, error: BaseException) -> SafegeneError:
    reason = str(getattr(error, "strerror", None) or error)[:300] or type(error).__name__
    message, public = (
        f"{where} cannot be read ({text}); check that it is there, that this server may read it "
        "and that nothing is writing to it."
        # A driver's own words may name files of this server.
        for text in (reason, type(error).__name__ if names_path(reason) else reason)
    )
    return SourceError(message, public=public)


def _not_plain(where: str) -> MissingFileError:
    return MissingFileError(f"{where} is not a plain file; expected a file.")


def _is_link(where: str) -> AdapterRejectedError:
    return AdapterRejectedError(
        f"{where} is a symbolic link; give a directory of plain files (cp -L makes one)."
    )


@contextmanager
def open_source(given: str | Path, rules: SourceRules) -> Iterator[Source]:
    """The directory that `given` names: an absolute path, `file://` and a path, or a remote URL.

    Errors: MissingFileError, SourceError (protocol, relative, credentials in the URL),
    AdapterRejectedError (outside the roots, through a link), ConfigError (options, missing driver).
    """
    text = os.fspath(given)
    match = _URL.fullmatch(text)
    if not _is_printable(text) or ("://" in text and ("::" in text or match is None)):
        raise SourceError(f"source {text!r} is not one path or one plain URL; give one directory.")
    if match is not None and match["protocol"].lower() not in ("file", "local"):
        yield _open_remote(match["protocol"].lower(), match["rest"], rules)
        return
    path = Path(text if match is None else match["rest"])
    descriptor = _open_local(path, rules)
    try:
        top = _top_of(path, rules) if rules.roots else Path(path.anchor)
        yield LocalSource(str(path), descriptor, is_snapshot(path, top))
    finally:
        os.close(descriptor)


def _is_printable(text: str) -> bool:
    """Whether the text can be a path and stands in a log as one line (JSON may hold anything)."""
    return all(c.isprintable() for c in text)


def _open_local(path: Path, rules: SourceRules) -> int:
    """A descriptor of the directory, reached without following a link below its root."""
    if not path.is_absolute():
        raise SourceError(
            f"source {str(path)!r} is a relative path; give an absolute one, or a URL: every "
            "server of this registry reads it."
        )
    if ".." in path.parts:
        raise AdapterRejectedError(f"source {path} contains '..'; give the plain path.")
    top = _top_of(path, rules)
    descriptor = -1
    try:
        descriptor = os.open(os.path.realpath(top), os.O_RDONLY | os.O_DIRECTORY)
        for part in path.relative_to(top).parts:
            mode = os.stat(part, dir_fd=descriptor, follow_symlinks=False).st_mode
            if stat.S_ISLNK(mode):
                raise _is_link(f"{path}: {part}")
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
            deeper = os.open(part, flags, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = deeper
    except (OSError, SafegeneError) as error:
        if descriptor >= 0:
            os.close(descriptor)
        if isinstance(error, FileNotFoundError):
            raise MissingFileError(f"source {path} is not there; check the path.") from error
        if isinstance(error, NotADirectoryError):
            raise MissingFileError(
                f"source {path} is not a directory; give the adapter's directory."
            ) from error
        if isinstance(error, OSError):
            raise _unreadable(str(path), error) from error
        raise
    return descriptor


def _top_of(path: Path, rules: SourceRules) -> Path:
    """Where the walk without links begins: the root that `path` is below, or its own parent."""
    if not rules.roots:
        return path.parent
    for root in rules.roots:
        for top in (root.absolute(), Path(os.path.realpath(root))):
            if path.is_relative_to(top):
                return top
    message, public = (
        f"source {path} is outside the allowed roots{roots}; move it below one of them or add its "
        "root to `sources.roots`."
        for roots in (f" ({', '.join(map(str, rules.roots))})", "")
    )
    raise AdapterRejectedError(message, public=public)


def _open_remote(protocol: str, rest: str, rules: SourceRules) -> RemoteSource:
    place, _, inside = rest.partition("/")
    _, at, host = place.rpartition("@")
    if at and protocol not in _AT_IS_NO_USER:
        raise SourceError(
            f"source {protocol}://...@{host} carries credentials; they would be stored and shown: "
            "put them in the storage options."
        )
    shown = f"{protocol}://{rest.rstrip('/')}"
    if protocol not in rules.protocols:
        raise SourceError(
            f"source {shown}: protocol {protocol!r} is not allowed; use an absolute path or one of "
            f"{', '.join(rules.protocols)}."
        )
    if protocol in ("http", "https") and re.search("[?#]", rest):
        raise SourceError(
            f"source {shown.partition('?')[0]} has a query or fragment; give the URL of a "
            "directory, below which the files have their usual names."
        )
    if {".", ".."} & set(inside.split("/")):
        raise AdapterRejectedError(f"source {shown} contains '.' or '..'; give the plain URL.")
    options = rules.options.get(protocol, {})
    try:
        # No file system or listing from a cache.
        fresh = {"skip_instance_cache": True, "use_listings_cache": False}
        system = fsspec.filesystem(protocol, **{**fresh, **options})
        path = str(system._strip_protocol(f"{protocol}://{rest}")).rstrip("/")
    except ImportError as error:
        raise ConfigError(
            f"source {shown}: the driver for {protocol} is not installed ({error}); install it on "
            f"every server with: pip install {_DRIVERS.get(protocol, 'the one that fsspec names')}"
        ) from error
    except Exception as error:
        raise ConfigError(
            f"storage options of {protocol!r} (keys: {', '.join(options) or 'none'}) or its driver "
            f"do not work: {type(error).__name__}; install what fsspec needs for {protocol} and "
            "check the options."
        ) from error
    return RemoteSource(shown, system, path)
