"""Watch for new versions of the registry and for a restored registry.

PostgreSQL notifies (LISTEN), SQLite is polled. Either way the version is read from the registry, so
a lost notification or connection delays a change but never loses it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Any

from sqlalchemy.exc import DBAPIError

from safegene_server.registry.database import CHANNEL
from safegene_server.registry.history import History, Seen
from safegene_server.registry.store import Registry
from safegene_vllm.errors import RegistryDownError

logger = logging.getLogger("vllm.safegene_server")

POLL_S = 0.5


def watch(history: History, stop: threading.Event, *, poll_s: float = POLL_S) -> Iterator[Seen]:
    """Yield the current version, then each new one and each loss of changes, until `stop` is set.

    Versions in between may be skipped. After a loss the version may be smaller, or the same.
    Blocks: run it in a thread. A database that does not respond is logged once and retried.
    """
    last: Seen | None = None
    down = False
    listener = _Listener(history.registry)
    try:
        while not stop.is_set():
            listener.open()
            try:
                found = history.poll()
            except RegistryDownError as error:
                if not down:
                    logger.warning("waiting for the registry: %s", error)
                down = True
            else:
                if down:
                    logger.info("the registry responds again")
                down = False
                if found != last:
                    last = found
                    yield found
                    continue
            listener.wait(stop, poll_s)
    finally:
        listener.close()


class _Listener:
    """LISTEN connection for new versions; without one (SQLite, or it broke) it only waits."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.driver: Any = None

    def open(self) -> None:
        """Open the connection if the registry is a PostgreSQL that responds."""
        if self.driver is not None or not self.registry.database.is_postgresql:
            return
        from psycopg import Error

        try:
            pooled = self.registry.database.engine.raw_connection()
            self.driver = pooled.driver_connection
            # Open for as long as the watch, so it must not count against the pool.
            pooled.detach()
            self.driver.rollback()
            self.driver.autocommit = True
            self.driver.execute(f"LISTEN {CHANNEL}")
        except (DBAPIError, Error) as error:
            logger.debug("cannot listen to the registry: %s", error)
            self.close()

    def wait(self, stop: threading.Event, poll_s: float) -> None:
        """Wait for a notification, a broken connection, or `poll_s`."""
        if self.driver is None:
            stop.wait(poll_s)
            return
        from psycopg import Error

        try:
            for _ in self.driver.notifies(timeout=poll_s, stop_after=1):
                pass
        except Error as error:
            logger.warning(
                "the connection that listens to the registry broke, reconnecting: %s", error
            )
            self.close()

    def close(self) -> None:
        if self.driver is not None:
            self.driver.close()
            self.driver = None
