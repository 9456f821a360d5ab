"""Background download of missing adapters, AT_ONCE at a time.

For one replica, in its event loop: a slow source delays only its own revision. A failed download is
retried after a pause for as long as the revision is wanted.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from safegene_server.registry import Identity, Revision

AT_ONCE = 4


class Fetches:
    """Downloads by `fetch` (blocks; stops once its event is set); `on_download` runs after each."""

    def __init__(
        self,
        fetch: Callable[[Revision, threading.Event], object],
        on_download: Callable[[], None],
        retry_s: float,
    ) -> None:
        self.fetch, self.on_download, self.retry_s = fetch, on_download, retry_s
        # Separate threads: slow sources must not delay the heartbeat's thread.
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="safegene-fetch")
        self._running: dict[Identity, tuple[asyncio.Task[None], threading.Event]] = {}
        self._failed: dict[Identity, Exception] = {}
        self._ended = asyncio.Event()

    def __len__(self) -> int:
        return len(self._running)

    def want(self, revision: Revision) -> None:
        """Start a download unless one is running. Errors: the error of the last attempt."""
        identity = revision.identity
        if identity not in self._running:
            stop = threading.Event()
            task = asyncio.create_task(self._download(revision, stop))
            self._running[identity] = task, stop
        if identity in self._failed:
            raise self._failed[identity].with_traceback(None)

    def keep(self, wanted: Iterable[Identity]) -> None:
        """Cancel the downloads of all other revisions."""
        for identity in self._running.keys() - set(wanted):
            task, stop = self._running.pop(identity)
            self._failed.pop(identity, None)
            stop.set()
            task.cancel()

    async def settled(self, within_s: float) -> None:
        """Wait until every running download has ended once, for `within_s` at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while self._running.keys() - self._failed.keys():
                    self._ended.clear()
                    await self._ended.wait()

    def stop(self) -> None:
        """Cancel all downloads."""
        self.keep(())
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _download(self, revision: Revision, stop: threading.Event) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                await loop.run_in_executor(self._threads, self.fetch, revision, stop)
            except Exception as error:
                self._failed[revision.identity] = error
                self._notify()
                await asyncio.sleep(self.retry_s)
            else:
                del self._running[revision.identity]
                self._failed.pop(revision.identity, None)
                self._notify()
                return

    def _notify(self) -> None:
        self._ended.set()
        self.on_download()
