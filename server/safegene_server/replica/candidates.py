"""Adapters that are in the engine for a moment, to be asked from inside and by nobody else.

Beside the revisions that a replica follows: no registry, no catalog, no receipts written down,
though every rank's receipt is verified all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safegene_server.engine_client import EngineClient

FIRST_ID = 2**30
"""Ids of trials begin here. The registry counts its revisions from 1 and will not get this far; the
engine keeps ids in 32 bits, so there is as much room above as below."""
PREFIX = "trial:"
"""No tenant has a colon in its name, so no request from outside resolves to a trial."""


class Candidates:
    """What is on trial in one engine. A name is never used twice, not even by another process: the
    engine's prefix cache knows adapters by their names."""

    def __init__(
        self, gate: EngineClient, models: Any, make_request: Callable[[str, int, Path], Any]
    ) -> None:
        self.gate, self.models, self.make_request = gate, models, make_request
        self._ids = itertools.count()
        self._running: dict[str, tuple[int, Any, Callable[[], None]]] = {}

    def __len__(self) -> int:
        return len(self._running)

    def new_name(self) -> str:
        return f"{PREFIX}{uuid.uuid4().hex}"

    async def begin(self, name: str, path: Path, clear: Callable[[], None]) -> None:
        """Into the engine, receipts verified; `clear` is called, in a thread, when it is over.

        Errors: those of `Gate.add`; nothing is left behind then.
        """
        number = FIRST_ID + next(self._ids) % FIRST_ID
        request = self.make_request(name, number, path)
        self._running[name] = (number, request, clear)
        try:
            await self.gate.add(request)
        except BaseException:
            with contextlib.suppress(Exception):
                await asyncio.shield(asyncio.ensure_future(self.end(name)))
            raise
        self.models.lora_requests[name] = request

    async def end(self, name: str) -> None:
        """Errors: those of the engine and of `clear`."""
        if name not in self._running:
            return
        number, request, clear = self._running.pop(name)
        self.models.lora_requests.pop(name, None)
        self.gate.verifier.forget(request)
        try:
            await self.gate.remove_lora(number)
        finally:
            await asyncio.to_thread(clear)
