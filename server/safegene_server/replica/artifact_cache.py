"""Local cache of the directories that one engine loads adapters from.

Missing adapters are downloaded, unused ones removed. For one replica, in its event loop.
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
    """Cache in `store`; `on_download` is called after each download that `find` started."""

    def __init__(
        self, store: Store, header: FamilyHeader, on_download: Callable[[], None], retry_s: float
    ) -> None:
        self.store, self.header = store, header
        self.fetches = Fetches(self._fetch, on_download, retry_s)
        self._stopped = threading.Event()

    async def find(self, revision: Revision) -> Path | None:
        """Return the directory to load, or None while the adapter is being downloaded.

        Errors: those of the store; the error of the last download.
        """
        try:
            return await asyncio.to_thread(self._ready, revision)
        except MissingFileError:
            if revision.source is None:
                raise
            self.fetches.want(revision)
            return None

    def directory(self, revision: Revision) -> Path:
        """Return the directory to load, after a download if missing. Blocks. Errors: as `stage`."""
        try:
            return self._ready(revision)
        except MissingFileError:
            if revision.source is None:
                raise
            self._fetch(revision, self._stopped)
            return self._ready(revision)

    async def clean(self, wanted: Iterable[Revision]) -> None:
        """Remove what no server of this machine has used for IDLE_S. Errors: StoreError.

        It is downloaded again when needed.
        """
        retained = [(revision.adapter_digest, revision.profile.digest) for revision in wanted]
        removed = await asyncio.to_thread(self.store.remove_unused, retained, idle_s=IDLE_S)
        if removed:
            logger.info("removed from the local store, unused for a day: %s", ", ".join(removed))

    def stop(self) -> None:
        """Cancel all downloads."""
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
