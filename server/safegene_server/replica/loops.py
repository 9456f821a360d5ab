"""Background loops of a replica: the thread that watches the registry, and repeated steps.

For keeping them going after errors. What a step does is not here.
"""

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


def listen(history: History, stop: threading.Event, heard: Callable[[Seen], object]) -> None:
    """Call `heard` at every new version, and when the registry was restored, until `stop` is set.
    Blocks: give it a thread. Errors are logged, and it goes on."""
    while not stop.is_set():
        try:
            for seen in watch(history, stop):
                heard(seen)
        except Exception:
            logger.exception("cannot watch the registry, trying again")
            stop.wait(RETRY_S)


async def forever(step: Callable[[], Any], pause_s: float) -> None:
    """Repeat a step; after one that failed, with a pause."""
    while True:
        try:
            await step()
        except RegistryDownError as error:
            logger.warning("the registry does not answer, served on as before: %s", error)
            await asyncio.sleep(pause_s)
        except (SafegeneError, EngineDownError) as error:
            logger.error("cannot follow the registry: %s", plain(error))
            await asyncio.sleep(pause_s)
        except Exception:
            logger.exception("cannot follow the registry")
            await asyncio.sleep(pause_s)
