"""Adapters that are in the engine for a moment, to be asked from inside and by nobody else.

Beside the revisions that a replica follows: no registry, no catalog, no receipts written down,
though every rank's receipt is verified all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safegene_server.engine_client import EngineClient
from safegene_server.registry import Revision
from safegene_server.replica.artifact_cache import ArtifactCache
from safegene_vllm.formats.profile import make_profile

FIRST_ID = 2**30
"""Ids of trials begin here. The registry counts its revisions from 1 and will not get this far; the
engine keeps ids in 32 bits, so there is as much room above as below."""
PREFIX = "trial:"
"""No tenant has a colon in its name, so no request from outside resolves to a trial."""


class Candidates:
    """What is on trial in one engine. A name is never used twice, not even by another process: the
    engine's prefix cache knows adapters by their names."""

    def __init__(
        self,
        gate: EngineClient,
        models: Any,
        make_request: Callable[[str, int, Path], Any],
        supply: ArtifactCache,
    ) -> None:
        self.supply = supply
        self.gate, self.models, self.make_request = gate, models, make_request
        self._ids = itertools.count()
        self._running: dict[str, tuple[int, Any, Callable[[], None]]] = {}

    def __len__(self) -> int:
        return len(self._running)

    async def begin(self, revision: Revision, coefficients: Sequence[float]) -> str:
        """The adapter of `revision` with these coefficients into the engine, receipts verified; the
        name to ask.

        Errors: BoundsError; those of `Supply.directory` and `Gate.add`; nothing is left then.
        """
        name = f"{PREFIX}{uuid.uuid4().hex}"
        # A profile of its own has a directory of its own, which goes with the trial.
        profile = make_profile(self.supply.header, coefficients, {"method": "trial", "name": name})
        tried = replace(revision, profile=profile)
        path = await asyncio.to_thread(self.supply.directory, tried)

        def clear() -> None:
            self.supply.store.drop(tried.adapter_digest, profile.digest)

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
        return name

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
