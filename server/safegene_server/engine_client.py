"""How an adapter becomes servable: into the engine, receipts from every rank, then its name.

Stands between vLLM's model list and the engine, so that whatever loads an adapter (our route,
SageMaker's, a resolver) publishes it only after its receipts have passed. Static adapters are
loaded before this is in place; the plugin verifies them at start.
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

from safegene_server.error_responses import EngineDownError, plain
from safegene_server.metrics import definitions
from safegene_server.verifier import Verifier, out_of_step
from safegene_vllm.errors import AdapterRejectedError, MissingFileError
from safegene_vllm.formats.adapter import WEIGHTS_FILE

refusal: ContextVar[Exception | None] = ContextVar("safegene_refusal", default=None)
"""Why the last `add_lora` of this task failed: vLLM passes on an abridged message only."""


READ_S, POLL_S = 300.0, 0.005
"""How long an adapter may be read, and how often it is asked after."""


class EngineClient:
    """The engine client as the model list sees it; all but adding and removing goes to the host."""

    def __init__(self, engine: Any, verifier: Verifier) -> None:
        self.engine = engine
        self.verifier = verifier
        self._files: dict[int, tuple[int, int]] = {}

    async def add_lora(self, request: Any) -> bool:
        """The host's contract: an exception means that the name is not published.

        Errors: MissingFileError, AdapterRejectedError (the engine's own message), ReceiptError,
        EngineDownError.
        """
        await self.add(request)
        return True

    async def add(self, request: Any) -> list[dict[str, Any] | None]:
        """The same, with what every rank reported. Errors: as `add_lora`."""
        begun_s = time.perf_counter()
        try:
            answers = await self._load(request)
            self.verifier.verify(request, answers)
        except Exception as error:
            refusal.set(error)
            if not self.verifier.published(request.lora_int_id):
                await self._take_back(request.lora_int_id)
            raise
        definitions.LOAD_SECONDS.observe(time.perf_counter() - begun_s)
        file = self._weights_file(request.lora_path)
        if file is not None:
            self._files[request.lora_int_id] = file
        return answers

    async def _load(self, request: Any) -> list[dict[str, Any] | None]:
        """The receipt of every rank, each of which has validated and loaded the tenant.

        Refusals are answers: of an exception in every rank vLLM reads only the first, and takes the
        others for answers to later calls. Errors: as `add_lora`.
        """
        if self._missing(request.lora_path):
            raise MissingFileError(
                f"lora_path {request.lora_path!r} is not a directory on this server; give the "
                "local directory of a PEFT adapter with a safegene.json (a hub name must be "
                "downloaded first)."
            )
        wanted = request.lora_name, request.lora_int_id, request.lora_path
        try:
            if not request.load_inplace:
                await self._read_ahead(*wanted)
            answers = await self.engine.collective_rpc(
                "safegene_add", args=(*wanted, request.load_inplace)
            )
        except Exception as error:
            raise self._told(error) from error
        try:
            reasons = dict.fromkeys(a["rejected"] for a in answers if a["rejected"] is not None)
            receipts = [answer["receipt"] for answer in answers]
        except (TypeError, KeyError) as error:
            raise out_of_step(error) from error
        if reasons:
            raise AdapterRejectedError("\n".join(reasons))
        return receipts

    async def _read_ahead(self, name: str, number: int, path: str) -> None:
        """Have every rank read and check the adapter beside its steps, which then wait for its slot
        alone. Not for a revision of what they hold: that costs less than the question.

        Errors: AdapterRejectedError for an adapter that is not read in time.
        """
        if not self._inside(path) or not (_plain(path) / WEIGHTS_FILE).is_file():
            return
        file, apply = self._weights_file(path), self.verifier.expected.settings.apply
        if file is not None and file in self._files.values() and apply != "composed":
            return
        until_s = time.monotonic() + READ_S
        wanted = name, number, path
        while not all(await self.engine.collective_rpc("safegene_begin", args=wanted)):
            if time.monotonic() > until_s:
                raise AdapterRejectedError(
                    f"adapter {name!r} at {path} was not read within {READ_S:g} s; ask again when "
                    "its storage is faster, or copy it to a local disk first."
                )
            await asyncio.sleep(POLL_S)

    async def remove_lora(self, lora_int_id: int) -> bool:
        """Out of the engine. Errors: AdapterRejectedError (the engine's message), EngineDownError."""
        self._files.pop(lora_int_id, None)
        try:
            return bool(await self.engine.remove_lora(lora_int_id))
        except Exception as error:
            raise self._told(error) from error

    def _told(self, error: Exception) -> Exception:
        """What the engine raised, as one of our errors."""
        if getattr(self.engine, "errored", False):
            return EngineDownError(f"the engine is down: {plain(error)}")
        return AdapterRejectedError(plain(error))

    def _missing(self, path: str) -> bool:
        """Whether to say so here. Of paths outside adapter_roots only the engine's refusal speaks:
        they are not even looked at."""
        return self._inside(path) and not _plain(path).is_dir()

    def _inside(self, path: str) -> bool:
        """Whether the path may be looked at here."""
        roots = self.verifier.expected.settings.adapter_roots
        return not roots or any(_plain(path).is_relative_to(_plain(str(root))) for root in roots)

    def _weights_file(self, path: str) -> tuple[int, int] | None:
        """Which file an adapter's weights are, if it is a read-only one of several names, as a
        store of revisions makes them; workers read such a one once."""
        if self._inside(path):
            with contextlib.suppress(OSError):
                about = (_plain(path) / WEIGHTS_FILE).lstat()
                shared = about.st_nlink > 1 and not about.st_mode & 0o222
                if stat.S_ISREG(about.st_mode) and shared:
                    return about.st_dev, about.st_ino
        return None

    async def _take_back(self, lora_int_id: int) -> None:
        """Remove what a failed load left behind in some ranks; nothing serves it."""
        remove = getattr(self.engine, "remove_lora", None)
        if remove is not None:
            with contextlib.suppress(Exception):
                await remove(lora_int_id)

    def __getattr__(self, name: str) -> Any:
        if name == "engine":
            raise AttributeError(name)
        return getattr(self.engine, name)


def _plain(path: str) -> Path:
    """Absolute, without a `..` that would lead out of a root."""
    return Path(os.path.normpath(Path(path).expanduser().absolute()))
