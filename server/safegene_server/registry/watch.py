"""Reports new versions of the registry, and a registry that was restored, within a fraction of a
second.

PostgreSQL notifies (LISTEN); SQLite is asked. Either way the registry itself is read, so a lost
notification or connection delays the news and never loses it. What follows from it is not here.
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
    """The version now, then each time that there is another one or that the registry has lost
    changes, until `stop` is set.

    Versions in between may be passed over. After a loss the version may be smaller, or the same.
    Blocks: give it a thread. A database that does not answer is waited for, and logged once.
    """
    last: Seen | None = None
    down = False
    listener = _Listener(history.registry)
    try:
        while not stop.is_set():
            listener.open()
            try:
                found = history.look()
            except RegistryDownError as error:
                if not down:
                    logger.warning("waiting for the registry: %s", error)
                down = True
            else:
                if down:
                    logger.info("the registry answers again")
                down = False
                if found != last:
                    last = found
                    yield found
                    continue
            listener.wait(stop, poll_s)
    finally:
        listener.close()


class _Listener:
    """A connection that hears of new versions; without one (SQLite, or it broke) it only waits."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.driver: Any = None

    def open(self) -> None:
        """Listen, if this is PostgreSQL and it answers; tried again at every turn."""
        if self.driver is not None or not self.registry.database.is_postgresql:
            return
        from psycopg import Error

        try:
            pooled = self.registry.database.engine.raw_connection()
            self.driver = pooled.driver_connection
            # Kept for as long as we watch, so it is none of the pool's any more.
            pooled.detach()
            self.driver.rollback()
            self.driver.autocommit = True
            self.driver.execute(f"LISTEN {CHANNEL}")
        except (DBAPIError, Error) as error:
            logger.debug("cannot listen to the registry: %s", error)
            self.close()

    def wait(self, stop: threading.Event, poll_s: float) -> None:
        """Until something is heard, the connection breaks, or `poll_s` is over."""
        if self.driver is None:
            stop.wait(poll_s)
            return
        from psycopg import Error

        try:
            for _ in self.driver.notifies(timeout=poll_s, stop_after=1):
                pass
        except Error as error:
            logger.warning("the registry's listener broke, listening anew: %s", error)
            self.close()

    def close(self) -> None:
        if self.driver is not None:
            self.driver.close()
            self.driver = None
