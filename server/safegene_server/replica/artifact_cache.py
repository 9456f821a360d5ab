"""The directories that one engine loads from: in the local store, fetched where they are missing,
and removed once nothing wants them.

For one replica, in its event loop.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from safegene_server.artifacts import Store, Watch
from safegene_server.registry import Revision
from safegene_server.replica.fetches import Fetches
from safegene_vllm.errors import MissingFileError
from safegene_vllm.formats.family import FamilyHeader

logger = logging.getLogger("vllm.safegene_server")

IDLE_S = 24 * 3600.0


class ArtifactCache:
    """`news` is called whenever the fetch of something that `here` was asked for has ended."""

    def __init__(
        self, store: Store, header: FamilyHeader, news: Callable[[], None], retry_s: float
    ) -> None:
        self.store, self.header = store, header
        self.fetches = Fetches(self._fetch, news, retry_s)
        self._stopped = threading.Event()

    async def here(self, revision: Revision) -> Path | None:
        """What the engine loads; None while its adapter is being fetched.

        Errors: those of the store; what the last fetch ended with.
        """
        try:
            return await asyncio.to_thread(self._ready, revision)
        except MissingFileError:
            if revision.source is None:
                raise
            self.fetches.want(revision)
            return None

    def directory(self, revision: Revision) -> Path:
        """The same, fetched while the caller waits. Blocks. Errors: those of staging."""
        try:
            return self._ready(revision)
        except MissingFileError:
            if revision.source is None:
                raise
            self._fetch(revision, self._stopped)
            return self._ready(revision)

    async def clean(self, wanted: Iterable[Revision]) -> None:
        """Remove what was not wanted for IDLE_S, by any server of this machine; it is fetched again
        if it ever is. Errors: StoreError."""
        keep = [(revision.adapter_digest, revision.profile.digest) for revision in wanted]
        removed = await asyncio.to_thread(self.store.remove_unused, keep, idle_s=IDLE_S)
        if removed:
            logger.info("removed from the store, unused for a day: %s", ", ".join(removed))

    def stop(self) -> None:
        """No fetch goes on."""
        self._stopped.set()
        self.fetches.stop()

    def _ready(self, revision: Revision) -> Path:
        return self.store.revision(revision.adapter_digest, revision.profile)

    def _fetch(self, revision: Revision, stop: threading.Event) -> None:
        assert revision.source is not None
        self.store.stage(
            revision.source,
            family=self.header,
            expected=revision.adapter_digest,
            watch=Watch(cancelled=stop),
        )
