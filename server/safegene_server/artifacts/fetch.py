"""Copy of a source's known files into a local directory, within limits, with their hashes.

Rejects sources that are incomplete, too large, too slow or changing while they are read.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from safegene_server.artifacts.layout import store_errors
from safegene_server.artifacts.source import Seen, Source, SourceRules, open_source
from safegene_vllm.errors import AdapterRejectedError, SourceError
from safegene_vllm.formats.adapter import CONFIG_FILE, WEIGHTS_FILE
from safegene_vllm.formats.metadata import DESCRIPTION_FILE
from safegene_vllm.formats.tenant_directory import RECORD_FILE
from safegene_vllm.formats.tenant_kind import SlotKind, slot_kind

FILES = (CONFIG_FILE, DESCRIPTION_FILE, WEIGHTS_FILE)


@dataclass(frozen=True)
class Limits:
    """How much of a source is read: bytes of the weights, of each JSON file, and seconds."""

    weights_bytes: int = 8 << 30
    json_bytes: int = 16 << 20
    timeout_s: float = 600.0


@dataclass(frozen=True)
class Copied:
    """One file of the local copy; `sha256` is hexadecimal."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Watch:
    """How a job follows a long fetch: `progress(bytes so far)` per chunk, and a way to stop it."""

    progress: Callable[[int], None] = lambda size_bytes: None
    cancelled: threading.Event = field(default_factory=threading.Event)


def fetch(
    given: str | Path,
    into: Path,
    *,
    rules: SourceRules,
    limits: Limits,
    watch: Watch | None = None,
) -> dict[str, Copied]:
    """Copy the known files that are there; synced, read-only, by name. Blocks for `timeout_s`.

    Errors: those of `open_source`; SourceError (unreadable, too large, too slow, changing,
    cancelled), MissingFileError, PickleRejectedError, AdapterRejectedError (not a tenant),
    StoreError.
    """
    watch = Watch() if watch is None else watch
    copy = _Copy(into, limits, watch)
    copied: dict[str, Copied] = {}
    failed: list[BaseException] = []

    def work() -> None:
        try:
            with open_source(given, rules) as source:
                copied.update(copy.all(source))
        except BaseException as error:
            failed.append(error)

    # A driver that hangs cannot be interrupted: it is left behind, and writes nothing more.
    thread = threading.Thread(target=work, name="safegene-fetch", daemon=True)
    deadline_s = time.monotonic() + limits.timeout_s
    thread.start()
    try:
        while thread.is_alive() and not watch.cancelled.is_set():
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise SourceError(
                    f"source {given} was not read within {limits.timeout_s:g} s; check that it "
                    "responds, or raise the timeout."
                )
            thread.join(min(left_s, 0.1))
    finally:
        copy.stop.set()
    if watch.cancelled.is_set():
        raise SourceError(f"reading source {given} was cancelled.")
    if failed:
        raise failed[0]
    return copied


class _Copy:
    """One fetch under way: where to, how much, and whether it is still wanted."""

    def __init__(self, into: Path, limits: Limits, watch: Watch) -> None:
        self.into = into
        self.limits = limits
        self.watch = watch
        self.stop = threading.Event()
        self.size_bytes = 0

    def all(self, source: Source) -> dict[str, Copied]:
        before = {name: source.stat(name) for name in FILES}
        kind = _kind(source)
        copied = {
            name: self.one(source, name, seen) for name, seen in before.items() if seen is not None
        }
        changed = [name for name in FILES if source.stat(name) != before[name]]
        if changed:
            raise SourceError(
                f"{source.shown}: {', '.join(changed)} changed while it was read; try again when "
                "nothing writes there."
            )
        # An upload may have continued meanwhile: the profile must still be alone.
        if kind == "profile":
            slot_kind(source)
        return copied

    def one(self, source: Source, name: str, seen: Seen) -> Copied:
        where = f"{source.shown}/{name}"
        limit = self.limits.weights_bytes if name == WEIGHTS_FILE else self.limits.json_bytes
        size, sha256 = 0, hashlib.sha256()
        if seen.size_bytes is not None:
            _check_size(where, seen.size_bytes, limit)
        with store_errors(self.into), (self.into / name).open("xb") as file:
            for data in source.chunks(name):
                if self.stop.is_set():
                    raise SourceError(f"{where}: reading was stopped.")
                size += len(data)
                _check_size(where, size, limit)
                sha256.update(data)
                file.write(data)
                self.size_bytes += len(data)
                self.watch.progress(self.size_bytes)
            if seen.size_bytes not in (None, size):
                raise SourceError(
                    f"{where} was announced with {seen.size_bytes} bytes, {size} were read; try "
                    "again when nothing writes there."
                )
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o444)
        return Copied(sha256.hexdigest(), size)


def _kind(source: Source) -> SlotKind:
    """Adapter or profile alone, decided on the source itself: our copy leaves files out.

    Errors: those of `slot_kind`; AdapterRejectedError for what already carries a vector.
    """
    if source.stat(RECORD_FILE) is not None:
        raise AdapterRejectedError(
            f"{source.shown} holds {RECORD_FILE}: a vector is already in these weights and would "
            "be added twice; give the tenant they were exported from."
        )
    return slot_kind(source)


def _check_size(where: str, size: int, limit: int) -> None:
    if size > limit:
        raise SourceError(
            f"{where} has {size} bytes or more, allowed are {limit}; give a smaller file or raise "
            "the limit."
        )
