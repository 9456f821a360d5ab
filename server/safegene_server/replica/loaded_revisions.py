"""The revisions that one engine holds, verified, each with the host's request for it.

Recognized by their content: vLLM goes by ids and names alone, and a registry that was restored may
give both to other content. Does not decide what comes and goes. For one replica, under its lock.
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
        self.revisions: dict[Identity, Revision] = {}
        self._requests: dict[Identity, Any] = {}

    async def add(self, revision: Revision, path: Path) -> None:
        """Into the engine; its receipts are told with the next sign of life. Nothing happens if it
        is held. Errors: those of `Gate.add`; RestoredError while `in_the_way` finds something."""
        identity = revision.identity
        if identity in self.revisions:
            return
        if found := self.in_the_way([revision]):
            raise RestoredError(_taken(revision, found))
        request = self.make_request(revision.served_name, revision.id, path)
        ranks = await self.gate.add(request)
        self.revisions[identity], self._requests[identity] = revision, request
        self.teller.came(identity, receipt_of(ranks, revision.id))
        self.models.lora_requests[revision.served_name] = request

    async def remove(self, identity: Identity) -> None:
        """Out of the engine. It counts as gone whatever the engine says: nothing names it any more.

        Errors: those of `Gate.remove_lora`.
        """
        revision, request = self.revisions.pop(identity), self._requests.pop(identity)
        self.models.lora_requests.pop(revision.served_name, None)
        self.gate.verifier.forget(request)
        self.teller.went(identity)
        await self.gate.remove_lora(revision.id)

    def in_the_way(self, revisions: Iterable[Revision]) -> list[Identity]:
        """Held revisions with the id or the name of one of these, and other content.

        vLLM takes two adapters of one name for one, and has one adapter per id, so it must be out
        of the engine before they can be added.
        """
        wanted = {revision.identity for revision in revisions}
        ids, names = {one.id for one in wanted}, {one.name for one in wanted}
        return [
            held
            for held in self.revisions
            if held not in wanted and (held.id in ids or held.name in names)
        ]


def _taken(revision: Revision, found: Iterable[Identity]) -> str:
    held = ", ".join(f"{one.name} (id {one.id}, profile {one.profile})" for one in found)
    return (
        f"{revision.served_name} (id {revision.id}, profile {revision.profile.digest}) cannot be "
        f"loaded while the engine holds {held}, of a registry that was restored since"
    )
