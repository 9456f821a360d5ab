"""Candidate adapters: loaded temporarily for internal requests, never served to a client.

They are in no registry and no catalog and their receipts are not stored, but every rank's receipt
is verified.
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
"""First id of a candidate. The registry counts revisions from 1 and will not get this far; the
engine has 32-bit ids, so there are as many ids above as below."""
PREFIX = "@candidate/"
"""No tenant name begins with an @, so no client request resolves to a candidate."""


class Candidates:
    """Candidates in one engine.

    A name is never reused, not even by another process: vLLM's prefix cache identifies adapters by
    name.
    """

    def __init__(
        self,
        engine: EngineClient,
        models: Any,
        make_request: Callable[[str, int, Path], Any],
        artifacts: ArtifactCache,
    ) -> None:
        self.artifacts = artifacts
        self.engine, self.models, self.make_request = engine, models, make_request
        self._ids = itertools.count()
        self._running: dict[str, tuple[int, Any, Callable[[], None]]] = {}

    def __len__(self) -> int:
        return len(self._running)

    async def begin(self, revision: Revision, coefficients: Sequence[float]) -> str:
        """Load the adapter of `revision` with these coefficients; return the name to request.

        Errors: BoundsError; those of `ArtifactCache.directory` and `EngineClient.add`; nothing is
        left behind then.
        """
        name = f"{PREFIX}{uuid.uuid4().hex}"
        # The name makes the profile unique, so its directory can be removed with the candidate.
        profile = make_profile(
            self.artifacts.header, coefficients, {"method": "trial", "name": name}
        )
        candidate = replace(revision, profile=profile)
        path = await asyncio.to_thread(self.artifacts.directory, candidate)

        def clear() -> None:
            self.artifacts.store.drop(candidate.adapter_digest, profile.digest)

        number = FIRST_ID + next(self._ids) % FIRST_ID
        request = self.make_request(name, number, path)
        self._running[name] = (number, request, clear)
        try:
            await self.engine.add(request, profile)
        except BaseException:
            with contextlib.suppress(Exception):
                await asyncio.shield(asyncio.ensure_future(self.end(name)))
            raise
        self.models.lora_requests[name] = request
        return name

    async def end(self, name: str) -> None:
        """Unload a candidate and remove its files. Errors: those of the engine and of `clear`."""
        if name not in self._running:
            return
        number, request, clear = self._running.pop(name)
        self.models.lora_requests.pop(name, None)
        self.engine.verifier.forget(request)
        try:
            await self.engine.remove_lora(number)
        finally:
            await asyncio.to_thread(clear)
