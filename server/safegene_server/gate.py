"""How an adapter becomes servable: into the engine, receipts from every rank, then its name.

Stands between vLLM's model list and the engine, so that whatever loads an adapter (our route,
SageMaker's, a resolver) publishes it only after its receipts have passed. Static adapters are
loaded before this is in place; the plugin verifies them at start.
"""

from __future__ import annotations

import contextlib
import time
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from safegene_server.answers import EngineDownError, plain
from safegene_server.metrics import catalogue
from safegene_server.verifier import Verifier, out_of_step
from safegene_vllm.errors import MissingFileError, TenantRefusedError

refusal: ContextVar[Exception | None] = ContextVar("safegene_refusal", default=None)
"""Why the last `add_lora` of this task failed: vLLM passes on an abridged message only."""


class Gate:
    """The engine client as the model list sees it; all but adding and removing goes to the host."""

    def __init__(self, engine: Any, verifier: Verifier) -> None:
        self.engine = engine
        self.verifier = verifier

    async def add_lora(self, request: Any) -> bool:
        """The host's contract: an exception means that the name is not published.

        Errors: MissingFileError, TenantRefusedError (the engine's own message), ReceiptError,
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
        catalogue.LOAD_SECONDS.observe(time.perf_counter() - begun_s)
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
        wanted = request.lora_name, request.lora_int_id, request.lora_path, request.load_inplace
        try:
            answers = await self.engine.collective_rpc("safegene_add", args=wanted)
        except Exception as error:
            raise self._told(error) from error
        try:
            reasons = dict.fromkeys(a["refused"] for a in answers if a["refused"] is not None)
            receipts = [answer["receipt"] for answer in answers]
        except (TypeError, KeyError) as error:
            raise out_of_step(error) from error
        if reasons:
            raise TenantRefusedError("\n".join(reasons))
        return receipts

    async def remove_lora(self, lora_int_id: int) -> bool:
        """Out of the engine. Errors: TenantRefusedError (the engine's message), EngineDownError."""
        try:
            return bool(await self.engine.remove_lora(lora_int_id))
        except Exception as error:
            raise self._told(error) from error

    def _told(self, error: Exception) -> Exception:
        """What the engine raised, as one of our errors."""
        if getattr(self.engine, "errored", False):
            return EngineDownError(f"the engine is down: {plain(error)}")
        return TenantRefusedError(plain(error))

    def _missing(self, path: str) -> bool:
        """Whether to say so here. Of paths outside adapter_roots only the engine's refusal speaks:
        they are not even looked at."""
        directory = Path(path).expanduser()
        roots = self.verifier.expected.settings.adapter_roots
        inside = any(directory.absolute().is_relative_to(root.absolute()) for root in roots)
        return (not roots or inside) and not directory.is_dir()

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
