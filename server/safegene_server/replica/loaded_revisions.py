"""The revisions that one engine holds, verified, each with the host's request for it.

Does not decide what comes and goes. For one replica, under its lock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safegene_server.engine_client import EngineClient
from safegene_server.registry import Revision
from safegene_server.replica.heartbeat import StatusReporter, receipt_of


class LoadedRevisions:
    """`models.lora_requests` has a name exactly as long as the engine holds its revision."""

    def __init__(
        self,
        gate: EngineClient,
        models: Any,
        make_request: Callable[[str, int, Path], Any],
        teller: StatusReporter,
    ) -> None:
        self.gate, self.models = gate, models
        self.make_request, self.teller = make_request, teller
        self.revisions: dict[int, Revision] = {}
        self._requests: dict[int, Any] = {}
        self._kept: Counter[str] = Counter()

    async def add(self, revision: Revision, path: Path) -> None:
        """Into the engine; its receipts are told with the next sign of life. Nothing happens if it
        is held. Errors: those of `Gate.add`."""
        if revision.id in self.revisions:
            return
        request = self.make_request(revision.served_name, revision.id, path)
        ranks = await self.gate.add(request)
        self.revisions[revision.id], self._requests[revision.id] = revision, request
        self.teller.came(revision.id, receipt_of(ranks, revision.id))
        self.models.lora_requests[revision.served_name] = request

    async def remove(self, number: int) -> None:
        """Out of the engine. It counts as gone whatever the engine says: nothing names it any more.

        Errors: those of `Gate.remove_lora`.
        """
        revision, request = self.revisions.pop(number), self._requests.pop(number)
        self.models.lora_requests.pop(revision.served_name, None)
        self.gate.verifier.forget(request)
        self.teller.went(number)
        await self.gate.remove_lora(number)

    def is_kept(self, served: str) -> bool:
        return served in self._kept

    @contextmanager
    def keeping(self, served: str) -> Iterator[None]:
        """A revision that is held stays meanwhile, as it does while a tenant's request runs."""
        self._kept[served] += 1
        try:
            yield
        finally:
            self._kept[served] -= 1
            if not self._kept[served]:
                del self._kept[served]
