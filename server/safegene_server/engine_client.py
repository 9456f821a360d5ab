"""Proxy of vLLM's engine client that publishes an adapter only after its receipts have passed.

Stands between vLLM's model list and the engine, so that every way to load an adapter (our route,
SageMaker's, a resolver) is verified. Static adapters load earlier; the plugin verifies them at
start.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import time
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from safegene_server.error_responses import EngineDownError, plain, set_public_name
from safegene_server.metrics import definitions
from safegene_server.verifier import Verifier, out_of_step
from safegene_vllm.errors import AdapterRejectedError, MissingFileError
from safegene_vllm.formats.adapter import WEIGHTS_FILE
from safegene_vllm.formats.profile import Profile

load_error: ContextVar[Exception | None] = ContextVar("safegene_load_error", default=None)
"""Why the last `add_lora` of this task failed: vLLM passes on an abridged message only."""

READ_S = 300.0
"""Time limit for reading an adapter."""
POLL_S, MAX_POLL_S, BACK_OFF = 0.005, 0.25, 1.5
"""First and longest interval of polling for it, and the factor between two."""


class EngineClient:
    """The engine client as vLLM's model list sees it; other attributes are the engine's own."""

    def __init__(self, engine: Any, verifier: Verifier) -> None:
        self.engine = engine
        self.verifier = verifier
        self._files: dict[int, tuple[int, int]] = {}

    async def add_lora(self, request: Any) -> bool:
        """Load an adapter; by vLLM's contract an exception leaves its name unpublished.

        Errors: MissingFileError, AdapterRejectedError (the engine's own message), ReceiptError,
        EngineDownError.
        """
        await self.add(request)
        return True

    async def add(
        self, request: Any, profile: Profile | None = None
    ) -> list[dict[str, Any] | None]:
        """Load an adapter and return the receipt of every rank, each verified.

        `profile` is what they must have applied; None: that of the directory. Errors: as
        `add_lora`.
        """
        started_s = time.perf_counter()
        try:
            receipts = await self._load(request)
            self.verifier.verify(request, receipts, profile)
        except Exception as error:
            load_error.set(error)
            set_public_name(error, request.lora_path, request.lora_name)
            if not self.verifier.published(request.lora_int_id):
                await self._remove_quietly(request.lora_int_id)
            raise
        definitions.LOAD_SECONDS.observe(time.perf_counter() - started_s)
        file = self._weights_file(request.lora_path)
        if file is not None:
            self._files[request.lora_int_id] = file
        return receipts

    async def _load(self, request: Any) -> list[dict[str, Any] | None]:
        """Validate and load the adapter in every rank; return their receipts.

        Workers return rejections instead of raising them: of exceptions in several ranks vLLM reads
        the first only, and takes the others for replies to later calls. Errors: as `add_lora`.
        """
        if self._missing(request.lora_path):
            raise MissingFileError(
                f"lora_path {request.lora_path!r} is not a directory on this server; give the "
                "local directory of a PEFT adapter with a safegene.json (a hub name must be "
                "downloaded first)."
            )
        adapter = request.lora_name, request.lora_int_id, request.lora_path
        try:
            if not request.load_inplace:
                await self._prefetch(*adapter)
            replies = await self.engine.collective_rpc(
                "safegene_add", args=(*adapter, request.load_inplace)
            )
        except Exception as error:
            raise self._translated(error) from error
        try:
            reasons = dict.fromkeys(r["rejected"] for r in replies if r["rejected"] is not None)
            receipts = [reply["receipt"] for reply in replies]
        except (TypeError, KeyError) as error:
            raise out_of_step(error) from error
        if reasons:
            raise AdapterRejectedError("\n".join(reasons))
        return receipts

    async def _prefetch(self, name: str, number: int, path: str) -> None:
        """Have every rank read and check the adapter in parallel with its steps.

        Skipped for a revision of weights that the ranks hold: loading it costs less than polling.
        Errors: AdapterRejectedError for an adapter that is not read in time.
        """
        if not self._may_inspect(path) or not (_normalized(path) / WEIGHTS_FILE).is_file():
            return
        file, apply = self._weights_file(path), self.verifier.plan.settings.apply
        if file is not None and file in self._files.values() and apply != "composed":
            return
        until_s, pause_s = time.monotonic() + READ_S, POLL_S
        adapter = name, number, path
        while not all(await self.engine.collective_rpc("safegene_begin", args=adapter)):
            if time.monotonic() > until_s:
                raise AdapterRejectedError(
                    f"adapter {name!r} at {path} was not read within {READ_S:g} s; try again when "
                    "its storage is faster, or copy it to a local disk first."
                )
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * BACK_OFF, MAX_POLL_S)

    async def remove_lora(self, lora_int_id: int) -> bool:
        """Unload an adapter.

        Errors: AdapterRejectedError (the engine's message), EngineDownError.
        """
        self._files.pop(lora_int_id, None)
        try:
            return bool(await self.engine.remove_lora(lora_int_id))
        except Exception as error:
            raise self._translated(error) from error

    def _translated(self, error: Exception) -> Exception:
        """Return the engine's exception as one of our errors."""
        if getattr(self.engine, "errored", False):
            return EngineDownError(f"the engine is down: {plain(error)}")
        return AdapterRejectedError(plain(error))

    def _missing(self, path: str) -> bool:
        """Return whether the directory is missing.

        False outside adapter_roots, which are not even looked at: the engine rejects those.
        """
        return self._may_inspect(path) and not _normalized(path).is_dir()

    def _may_inspect(self, path: str) -> bool:
        roots = self.verifier.plan.settings.adapter_roots
        return not roots or any(
            _normalized(path).is_relative_to(_normalized(str(root))) for root in roots
        )

    def _weights_file(self, path: str) -> tuple[int, int] | None:
        """Return device and inode of weights that several revisions of a store share.

        Those are read-only hard links, which workers read once. None for other files.
        """
        if self._may_inspect(path):
            with contextlib.suppress(OSError):
                status = (_normalized(path) / WEIGHTS_FILE).lstat()
                shared = status.st_nlink > 1 and not status.st_mode & 0o222
                if stat.S_ISREG(status.st_mode) and shared:
                    return status.st_dev, status.st_ino
        return None

    async def _remove_quietly(self, lora_int_id: int) -> None:
        """Remove what a failed load left in some ranks; no name leads to it."""
        remove = getattr(self.engine, "remove_lora", None)
        if remove is not None:
            with contextlib.suppress(Exception):
                await remove(lora_int_id)

    def __getattr__(self, name: str) -> Any:
        if name == "engine":
            raise AttributeError(name)
        return getattr(self.engine, name)


def _normalized(path: str) -> Path:
    """Return an absolute path without `..`, which could lead out of a root."""
    return Path(os.path.normpath(Path(path).expanduser().absolute()))
