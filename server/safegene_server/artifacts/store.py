"""The local store: staged adapters by content, and one directory per revision for the engine.

    adapters/<sha256>/                the two files of a PEFT adapter, read-only
    revisions/<sha256>-<sha256>/      the same files (hard links) and one profile

Everything can be rebuilt from the sources and the registry. Calls block: not for an event loop.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safegene_server.artifacts import layout
from safegene_server.artifacts.check import (
    ADAPTER_FILES,
    adapter_damage,
    check_tenant_files,
    revision_damage,
)
from safegene_server.artifacts.fetch import Limits, Watch, fetch
from safegene_server.artifacts.layout import (
    ADAPTERS,
    REVISIONS,
    hexadecimal,
    locked,
    revision_name,
    store_errors,
    workspace,
)
from safegene_server.artifacts.source import SourceRules, naming_source
from safegene_vllm.errors import DigestError, MissingFileError, raise_errors
from safegene_vllm.formats.adapter import WEIGHTS_FILE
from safegene_vllm.formats.family import FamilyHeader
from safegene_vllm.formats.metadata import DESCRIPTION_FILE
from safegene_vllm.formats.profile import Profile, save_profile

_ADAPTER_NAME = re.compile(r"[0-9a-f]{64}")
_REVISION_NAME = re.compile(r"(none|[0-9a-f]{64})-[0-9a-f]{64}")


@dataclass(frozen=True)
class Staged:
    """What a source held. `digest` and `directory` are None for a tenant that is only a profile.

    `profile` came with the adapter and is checked; None without one.
    """

    digest: str | None
    directory: Path | None
    kind: Literal["adapter", "profile"]
    size_bytes: int
    profile: Profile | None


class Store:
    """One directory on this machine; any number of processes and threads may use it at once."""

    def __init__(
        self,
        root: Path,
        *,
        rules: SourceRules | None = None,
        limits: Limits | None = None,
    ) -> None:
        """Errors: StoreError."""
        self.root = Path(root).absolute()
        self.rules = SourceRules() if rules is None else rules
        self.limits = Limits() if limits is None else limits
        layout.make_root(self.root)

    def stage(
        self,
        source: str | Path,
        *,
        family: FamilyHeader,
        expected: str | None = None,
        watch: Watch | None = None,
    ) -> Staged:
        """Fetch, check and store the content of `source`; nothing is stored of what fails a check.

        With `expected`, an adapter of another digest is rejected and a profile with it ignored:
        for fetching a registered source again on another replica.
        Errors: those of `fetch` and `check_tenant_files`; DigestError.
        """
        with workspace(self.root) as work, naming_source():
            content = work / "content"
            with store_errors(content):
                content.mkdir()
            copied = fetch(source, content, rules=self.rules, limits=self.limits, watch=watch)
            digest = None
            if WEIGHTS_FILE in copied:
                digest = layout.adapter_digest_of({f: copied[f].sha256 for f in ADAPTER_FILES})
            if expected is not None and digest != expected:
                raise DigestError(
                    f"source {source} has digest {digest}, expected {expected}; its content is no "
                    "longer what was registered: register a new revision."
                )
            if expected is not None and copied.pop(DESCRIPTION_FILE, None) is not None:
                with store_errors(content):
                    (content / DESCRIPTION_FILE).unlink()
            profile = check_tenant_files(content, family, str(source))
            size_bytes = sum(file.size_bytes for file in copied.values())
            if digest is None:
                return Staged(None, None, "profile", size_bytes, profile)
            target = self._install(digest, content, work / "damaged")
            return Staged(digest, target, "adapter", size_bytes, profile)

    def _install(self, digest: str, content: Path, aside: Path) -> Path:
        """Install fetched content, unless the same is there already and undamaged."""
        target = self._adapter(digest)
        with store_errors(target):
            damaged = target.exists() and adapter_damage(target, digest) is not None
        with locked(self.root):
            if target.exists() and not damaged:
                os.utime(target)
            else:
                (content / DESCRIPTION_FILE).unlink(missing_ok=True)
                layout.install(content, target, aside)
        return target

    def revision(self, adapter_digest: str | None, profile: Profile) -> Path:
        """The directory that the engine loads this adapter with this profile from.

        Made at the first call, the same at every other. Errors: MissingFileError if the adapter is
        not staged here; StoreError.
        """
        target = self._revision(adapter_digest, profile.digest)
        with locked(self.root, shared=True):
            if self._is_whole(target, adapter_digest, profile.digest):
                return target
        with workspace(self.root) as work, locked(self.root):
            if not self._is_whole(target, adapter_digest, profile.digest):
                fresh = work / "revision"
                fresh.mkdir()
                if adapter_digest is not None:
                    self._link_adapter(adapter_digest, fresh)
                save_profile(profile, fresh)
                (fresh / DESCRIPTION_FILE).chmod(0o444)
                layout.install(fresh, target, work / "damaged")
        return target

    def _is_whole(self, target: Path, adapter_digest: str | None, profile_digest: str) -> bool:
        """Whether the revision may be handed out; if so, it counts as used now."""
        adapter = None if adapter_digest is None else self._adapter(adapter_digest)
        if revision_damage(target, adapter_digest, profile_digest, trusted=adapter) is not None:
            return False
        for path in (target, adapter):
            if path is not None and path.exists():
                os.utime(path)
        return True

    def _link_adapter(self, digest: str, fresh: Path) -> None:
        adapter = self._adapter(digest)
        for name in ADAPTER_FILES:
            if not (adapter / name).is_file():
                raise MissingFileError(
                    f"adapter {digest} is not in this server's store; stage its source again."
                )
            layout.link(adapter / name, fresh / name)
        os.utime(adapter)

    def drop(self, adapter_digest: str | None, profile_digest: str) -> None:
        """Delete one revision's directory if it exists; its adapter stays.

        Errors: StoreError, DigestError.
        """
        target = self._revision(adapter_digest, profile_digest)
        with workspace(self.root) as work, locked(self.root):
            if target.exists():
                os.rename(target, work / "dropped")

    def verify(self, adapter_digest: str | None, profile_digest: str | None = None) -> None:
        """Read everything again: the adapter, and the revision if a profile is named.

        Errors: MissingFileError (stage again), DigestError (damaged: stage, then ask for the
        revision again), StoreError.
        """
        if adapter_digest is None and profile_digest is None:
            raise ValueError("name an adapter, a profile or both")
        damages = []
        with store_errors(self.root):
            if adapter_digest is not None:
                damages.append(adapter_damage(self._adapter(adapter_digest), adapter_digest))
            if profile_digest is not None:
                target = self._revision(adapter_digest, profile_digest)
                damages.append(revision_damage(target, adapter_digest, profile_digest))
        raise_errors([damage for damage in damages if damage is not None])

    def remove_unused(
        self, retain: Iterable[tuple[str | None, str]], *, idle_s: float = 3600.0
    ) -> tuple[str, ...]:
        """Delete what is not in `retain` and was not used in the last `idle_s` seconds.

        `retain` holds (adapter digest or None, profile digest): it counts as used now, for other
        processes too. Returns the deleted paths relative to the root.
        Errors: StoreError; DigestError for a digest that is none.
        """
        used = tuple(retain)
        revisions = {revision_name(adapter, profile) for adapter, profile in used}
        layout.sweep(self.root)
        removed: list[str] = []
        with workspace(self.root) as work, locked(self.root):
            before_s = time.time() - idle_s
            for folder, pattern, retained in (
                (REVISIONS, _REVISION_NAME, revisions),
                (
                    ADAPTERS,
                    _ADAPTER_NAME,
                    {hexadecimal(a) for a, _ in used if a is not None},
                ),
            ):
                for path in sorted((self.root / folder).iterdir()):
                    if path.name in retained:
                        os.utime(path)
                    elif pattern.fullmatch(path.name) and path.stat().st_mtime <= before_s:
                        os.rename(path, work / f"{folder}-{path.name}")
                        removed.append(f"{folder}/{path.name}")
        return tuple(removed)

    def _adapter(self, digest: str) -> Path:
        return self.root / ADAPTERS / hexadecimal(digest)

    def _revision(self, adapter_digest: str | None, profile_digest: str) -> Path:
        return self.root / REVISIONS / revision_name(adapter_digest, profile_digest)
