"""Background loops of a replica: the registry watcher, and steps repeated even after errors."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

from safegene_server.error_responses import EngineDownError, plain
from safegene_server.registry import History, Seen, watch
from safegene_vllm.errors import RegistryDownError, SafegeneError

logger = logging.getLogger("vllm.safegene_server")

RETRY_S = 5.0


def listen(history: History, stop: threading.Event, on_change: Callable[[Seen], object]) -> None:
    """Call `on_change` at every new version and after a restore, until `stop` is set.

    Blocks: run it in a thread. Errors are logged and watching is retried.
    """
    while not stop.is_set():
        try:
            for seen in watch(history, stop):
                on_change(seen)
        except Exception:
            logger.exception("cannot watch the registry; trying again in %g s", RETRY_S)
            stop.wait(RETRY_S)


async def forever(step: Callable[[], Any], pause_s: float) -> None:
    """Repeat a step forever, with a pause after an error."""
    while True:
        try:
            await step()
        except RegistryDownError as error:
            logger.warning("the registry is unavailable; serving what is loaded: %s", error)
            await asyncio.sleep(pause_s)
        except (SafegeneError, EngineDownError) as error:
            logger.error("cannot follow the registry; trying again: %s", plain(error))
            await asyncio.sleep(pause_s)
        except Exception:
            logger.exception("cannot follow the registry; trying again")
            await asyncio.sleep(pause_s)
