"""Verified revisions that one engine has loaded, each with its LoRARequest.

Identified by content: vLLM uses only ids and names, and a restored registry may give both to other
content. For one replica, under its lock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safegene_server.engine_client import EngineClient
from safegene_server.registry import Identity, Revision
from safegene_server.replica.heartbeat import StatusReporter, receipt_of
from safegene_vllm.errors import RestoredError


class LoadedRevisions:
    """Loaded revisions; `models.lora_requests` has a name exactly while its revision is loaded."""

    def __init__(
        self,
        engine: EngineClient,
        models: Any,
        make_request: Callable[[str, int, Path], Any],
        reporter: StatusReporter,
    ) -> None:
        self.engine, self.models = engine, models
        self.make_request, self.reporter = make_request, reporter
        self.revisions: dict[Identity, Revision] = {}
        self._requests: dict[Identity, Any] = {}

    async def add(self, revision: Revision, path: Path) -> None:
        """Load a revision unless it is loaded; its receipts are reported with the next heartbeat.

        Errors: those of `EngineClient.add`; RestoredError while `conflicting` finds any.
        """
        identity = revision.identity
        if identity in self.revisions:
            return
        if found := self.conflicting([revision]):
            raise RestoredError(_conflict(revision, found))
        request = self.make_request(revision.served_name, revision.id, path)
        ranks = await self.engine.add(request, revision.profile)
        self.revisions[identity], self._requests[identity] = revision, request
        self.reporter.record_loaded(identity, receipt_of(ranks, revision.id))
        self.models.lora_requests[revision.served_name] = request

    async def remove(self, identity: Identity) -> None:
        """Unload a revision. It counts as unloaded even on an error: no name resolves to it.

        Errors: those of `EngineClient.remove_lora`.
        """
        revision, request = self.revisions.pop(identity), self._requests.pop(identity)
        self.models.lora_requests.pop(revision.served_name, None)
        self.engine.verifier.forget(request)
        self.reporter.record_unloaded(identity)
        await self.engine.remove_lora(revision.id)

    def conflicting(self, revisions: Iterable[Revision]) -> list[Identity]:
        """Loaded revisions with the id or the name of one of these, but other content.

        vLLM treats two adapters with one name as the same, and has one adapter per id, so these
        must be unloaded first.
        """
        wanted = {revision.identity for revision in revisions}
        ids, names = {one.id for one in wanted}, {one.name for one in wanted}
        return [
            held
            for held in self.revisions
            if held not in wanted and (held.id in ids or held.name in names)
        ]


def _conflict(revision: Revision, found: Iterable[Identity]) -> str:
    held = ", ".join(f"{one.name} (id {one.id}, profile {one.profile})" for one in found)
    return (
        f"{revision.served_name} (id {revision.id}, profile {revision.profile.digest}) cannot be "
        f"loaded while the engine holds {held}, from before the registry was restored; try "
        "again once its requests have ended"
    )
