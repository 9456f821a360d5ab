"""Keeps one engine and its catalog as the registry says, and tells the registry what it holds.

One order for every change: stage, validate, add to the engine, receipts from every rank, then the
name; what nobody is served from any more is removed once nothing of it is in flight.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from safegene_server.access.catalog import Catalog
from safegene_server.access.limits import Counters
from safegene_server.artifacts import Store
from safegene_server.engine_client import EngineClient
from safegene_server.error_responses import EngineDownError, plain
from safegene_server.metrics import definitions
from safegene_server.registry import History, Identity, Position, Registry, Revision, Seen, Snapshot
from safegene_server.replica.aliases import Aliases
from safegene_server.replica.artifact_cache import ArtifactCache
from safegene_server.replica.candidates import Candidates
from safegene_server.replica.heartbeat import ACTOR, BEAT_S, StatusReporter, Told, receipt_of
from safegene_server.replica.internal_client import InternalClient
from safegene_server.replica.lag import Lag, Waiting
from safegene_server.replica.loaded_revisions import LoadedRevisions
from safegene_server.replica.loops import RETRY_S, forever, listen
from safegene_server.replica.retention import QUIET_S, Retention
from safegene_server.replica.view import view_of
from safegene_vllm.errors import ConfigError, RestoredError, SafegeneError
from safegene_vllm.formats.family import FamilyHeader

logger = logging.getLogger("vllm.safegene_server")

AFTER_S = 0.05
"""Before a change is reported: whoever made it is answered first."""
DRIFT_S = 30.0
CLEAN_S = 600.0
FETCH_S = 30.0
"""How long the start waits for adapters that must be fetched; they come later all the same."""
DRAIN_S = 30.0
"""How long a load waits for requests on other content under the same id or name."""
RESTORED = (
    "the registry has lost changes that this server has seen, or has other content under an id (it "
    "was restored, or failed over to a standby that lagged): what it says now is not applied yet"
)


class Reconciler:
    """`make_request(name, id, path)` gives the host's request for an adapter."""

    def __init__(
        self,
        *,
        registry: Registry,
        store: Store,
        gate: EngineClient,
        models: Any,
        catalog: Catalog,
        counters: Counters,
        inside: InternalClient,
        make_request: Callable[[str, int, Path], Any],
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_change` is called when other revisions are served than before.

        Errors: ConfigError for an engine that has no family.
        """
        header = gate.verifier.plan.header
        if header is None:
            raise ConfigError("a registry needs an engine with a family; set safegene.family.")
        self.header: FamilyHeader = header
        self.registry, self.gate, self.models = registry, gate, models
        self.catalog, self.counters, self.inside = catalog, counters, inside
        self.version = 0
        self.lag = Lag()
        self.on_change = on_change
        self._history = History(registry)
        self._losses = 0
        self._teller = StatusReporter(registry, self._introduce, self._recall)
        self._family_source: str | None = None
        self._holding = LoadedRevisions(gate, models, make_request, self._teller)
        self._aliases = Aliases(self._holding.revisions)
        self._retention = Retention(self._holding, self._aliases, counters)
        self._blocking: set[Identity] = set()
        self._waiting = Waiting()
        self._known: tuple[Revision, ...] = ()
        self._faults: tuple[str, ...] = ("it has not followed the registry yet",)
        self._drift: tuple[str, ...] = ()
        self._lock = asyncio.Lock()
        self._news = asyncio.Event()
        self._loose = asyncio.Event()
        self.supply = ArtifactCache(store, header, self._news.set, RETRY_S)
        self._trials = Candidates(gate, models, make_request, self.supply)
        self._stop = threading.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def id(self) -> str:
        """This replica in the registry; empty before it has joined."""
        return self._teller.id

    async def start(self, family_source: str | None) -> None:
        """Join the registry, apply what is published, then keep following it.

        A revision that cannot be applied leaves the server unready, not down.
        Errors: RegistryError and its kinds, EngineDownError.
        """
        self._family_source = family_source
        await self._teller.join(self.version, self.faults(), None)
        await self.reconcile()
        loop = asyncio.get_running_loop()
        threading.Thread(
            target=listen,
            args=(self._history, self._stop, partial(self._hear, loop)),
            name="safegene-registry",
            daemon=True,
        ).start()
        self._tasks = [
            asyncio.create_task(forever(self._follow, RETRY_S)),
            asyncio.create_task(forever(self._beat, BEAT_S)),
            asyncio.create_task(forever(self._look, DRIFT_S)),
            asyncio.create_task(forever(self._clean, CLEAN_S)),
        ]

    async def stop(self) -> None:
        """Stop following and leave the registry; what is served goes on being served."""
        self._stop.set()
        self.supply.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            await asyncio.to_thread(self.registry.leave, self.id, actor=ACTOR)
        except SafegeneError as error:
            logger.warning("left without saying so: %s", error)

    def faults(self) -> tuple[str, ...]:
        """Why this replica is not ready; empty if it serves all that is published."""
        restored = () if self._losses == self._history.losses else (RESTORED,)
        return restored + self._faults + self._drift

    async def call(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> httpx.Response:
        """A request to this server's own app, past the access check."""
        return await self.inside.call(method, path, body)

    async def reconcile(self) -> None:
        """Make engine and catalog follow the registry as it is now, and report. What must be
        fetched for it is waited for, up to FETCH_S.

        Errors: RegistryDownError (nothing changes then).
        """
        await self.apply()
        if self.supply.fetches:
            await self.supply.fetches.settled(FETCH_S)
            await self.apply()
        async with self._lock:
            await self._tell()

    async def apply(self) -> None:
        """Make engine and catalog follow the registry as it is now, as far as this machine has the
        adapters; the others are fetched, and applied once they are here. The report comes right
        after, in the background, for whoever made the change need not wait for it.

        Errors: RegistryDownError (nothing changes then).
        """
        async with self._lock:
            begun_s = self.lag.clock()
            snapshot, losses = await asyncio.to_thread(self._history.snapshot)
            self.lag.hear(snapshot.version, losses)
            wanted = [r for r in snapshot.revisions if r.profile.family == self.header.digest]
            right = {revision.identity for revision in (*wanted, *snapshot.previous)}
            restored = losses != self._losses
            withdrawn = self._aliases.withdraw(wanted, right if restored else None)
            if restored or withdrawn:
                self.version, self._faults = 0, (RESTORED,)
            if restored:
                self._teller.restored()
            offered = self._aliases.targets()
            late = [r.identity for r in wanted if r.identity not in offered]
            self._waiting.expect(late, min(begun_s, self.lag.heard_s(snapshot.version)))
            self.supply.fetches.keep(late)
            if restored or withdrawn or any(one not in self._holding.revisions for one in late):
                # Keys, limits and who is gone wait for no adapter.
                self._offer(snapshot, wanted)
            definitions.replica_gauges().losses.inc(losses - self._losses)
            self._losses, self._retention.warm = losses, right
            self._blocking = await self._retention.make_room(wanted)
            faults, coming = await self._bring(wanted)
            self._offer(snapshot, wanted)
            self._retention.tried -= {revision.identity for revision in wanted}
            self._known = (*snapshot.revisions, *snapshot.previous)
            self._faults = tuple(faults)
            if not faults and not coming:
                self.version = snapshot.version
                self.lag.apply(snapshot.version, losses)
            elif not self.version:
                # Never level so far, so not ready; later on the former revisions are served.
                self._faults += tuple(f"{name}: it is being fetched" for name in coming)
        self._loose.set()

    async def _bring(self, wanted: Iterable[Revision]) -> tuple[list[str], list[str]]:
        """What can be had now into the engine; the faults, and the names of what is on its way."""
        faults: list[str] = []
        coming: list[str] = []
        for revision in wanted:
            if revision.identity in self._holding.revisions:
                continue
            try:
                path = await self.supply.here(revision)
                if path is None:
                    coming.append(revision.served_name)
                else:
                    await self._holding.add(revision, path)
                    await self._teller.live(*self._state())
            except (SafegeneError, EngineDownError) as error:
                faults.append(f"{revision.served_name}: {plain(error)}")
                logger.error("%s is not applied here: %s", revision.served_name, plain(error))
        return faults, coming

    async def load(self, revision: Revision) -> None:
        """Bring a revision into the engine, verified, without offering it; it stays until `unload`,
        or until it has been published and superseded.

        Errors: those of staging, AdapterRejectedError, ReceiptError, EngineDownError; RestoredError
        while other content, of a registry that was restored, is in use under its id or name.
        """
        self._retention.tried.add(revision.identity)
        try:
            async with self._lock:
                if revision.identity in self._holding.revisions:
                    return
            path = await asyncio.to_thread(self.supply.directory, revision)
            until_s = self.lag.clock() + DRAIN_S
            while True:
                async with self._lock:
                    blocking = await self._retention.make_room([revision])
                    if not blocking or self.lag.clock() >= until_s:
                        await self._holding.add(revision, path)
                        return
                # The registry was restored, which may not have been noticed here yet.
                await self.apply()
                if blocking & self._retention.warm:
                    until_s = self.lag.clock()
                await asyncio.sleep(QUIET_S)
        except BaseException:
            self._retention.tried.discard(revision.identity)
            raise

    async def unload(self, revision: Revision) -> None:
        """The trial is over; it stays if it has been published meanwhile."""
        async with self._lock:
            self._retention.tried.discard(revision.identity)
            await self._retention.remove(list(self._holding.revisions))
            await self._tell()

    async def begin_trial(self, revision: Revision, coefficients: Sequence[float]) -> str:
        """Load the adapter of `revision` with other coefficients, one per layer of the base, for
        `call` alone; the name to ask. Nobody is offered it, and the registry never hears of it.
        Errors: BoundsError; those of `load`."""
        return await self._trials.begin(revision, coefficients)

    async def end_trial(self, name: str) -> None:
        """Out of the engine and off the disk; nothing happens if it has ended.

        Errors: EngineDownError or what the engine raises; StoreError.
        """
        await self._trials.end(name)

    def offered(self) -> list[tuple[str, Revision]]:
        """Tenants and the revisions that their names lead to here, the first published first."""
        return self._aliases.offered()

    def free_slots(self) -> int:
        """How many adapters fit on the device beside those that are held here."""
        slots = int(self.gate.vllm_config.lora_config.max_loras)
        return max(0, slots - len(self._holding.revisions) - len(self._trials))

    def in_flight(self) -> int:
        """Requests of tenants that run now, in this process."""
        return self.counters.running.total()

    def schedules_by_priority(self) -> bool:
        """Whether this engine takes a `priority` with a request."""
        return bool(self.gate.vllm_config.scheduler_config.policy == "priority")

    def serving(self) -> dict[str, str]:
        """Tenant to the revision that answers for it here, `tenant@N`."""
        return self._aliases.serving()

    def keeping(self, served: str) -> AbstractContextManager[None]:
        """A revision that is held stays meanwhile, as it does while a tenant's request runs."""
        return self._retention.keeping(served)

    def _offer(self, snapshot: Snapshot, wanted: Sequence[Revision]) -> None:
        """Switch every alias whose revision is held; the others stay where they are."""
        changed, new = self._aliases.switch(snapshot, wanted)
        base = [model.name for model in self.models.base_model_paths]
        self.catalog.replace(view_of(snapshot, self.header.digest, self.serving(), base))
        for one in new:
            definitions.APPLY_SECONDS.observe(self.lag.clock() - self._waiting.pop_s(one))
        if changed:
            self.on_change()

    def _state(self) -> tuple[int, tuple[str, ...], Position | None]:
        """What is reported: the version served, why it is not a later one, and the position in the
        registry that both belong to."""
        seen = self._history.position
        version = self.version if self._losses == self._history.losses else 0
        return version, self.faults(), seen

    async def _introduce(self) -> None:
        """Errors: RegistryError and its kinds."""
        source = self._family_source
        await asyncio.to_thread(self.registry.add_family, self.header, source, actor=ACTOR)

    async def _tell(self) -> None:
        try:
            await self._teller.tell(*self._state())
        except RestoredError:
            # Reported once the registry is followed as it is now.
            self._news.set()

    async def _recall(self) -> dict[Identity, Told]:
        """The receipts of all that is held. Errors: EngineDownError, ReceiptError."""
        held = self._holding.revisions
        ranks = await self.gate.verifier.receipts() if held else []
        return {one: receipt_of(ranks, one.id) for one in held}

    def _hear(self, loop: asyncio.AbstractEventLoop, seen: Seen) -> None:
        """In a thread: wake `_follow` at every new version, and when the registry was restored."""
        self.lag.hear(seen.version, seen.losses)
        applied = self.version, self._losses
        if (seen.version, seen.losses) != applied and not loop.is_closed():
            loop.call_soon_threadsafe(self._news.set)

    async def _follow(self) -> None:
        """One change, or another try of what failed."""
        try:
            async with asyncio.timeout(RETRY_S if self._faults else None):
                await self._news.wait()
        except TimeoutError:
            pass
        self._news.clear()
        try:
            await self.apply()
        except BaseException:
            # Nobody tells of a version twice, so this one is still news.
            self._news.set()
            raise

    async def _beat(self) -> None:
        """A sign of life, soon after a change; then what is superseded and drained goes, which
        waits for the engine's step."""
        with suppress(TimeoutError):
            async with asyncio.timeout(BEAT_S):
                await self._loose.wait()
        if self._loose.is_set():
            await asyncio.sleep(AFTER_S)
        self._loose.clear()
        async with self._lock:
            await self._tell()
            unused = self._retention.unused(self._holding.revisions.keys() - self._blocking)
        if self._retention.unused(self._blocking):
            # `apply` removes them, and adds what they are in the way of.
            self._news.set()
        if unused:
            await asyncio.sleep(QUIET_S)
            async with self._lock:
                if await self._retention.remove(unused):
                    await self._tell()

    async def _look(self) -> None:
        """Whether the engine still holds what its receipts promised."""
        await asyncio.sleep(DRIFT_S)
        report = await self.gate.verifier.report()
        if report.faults != self._drift:
            for fault in report.faults:
                logger.error("drift: %s", fault)
            self._drift = report.faults
            async with self._lock:
                await self._tell()

    async def _clean(self) -> None:
        """What no tenant of the registry is served from or goes back to, and nothing holds, may go
        from the disk."""
        await asyncio.sleep(CLEAN_S)
        await self.supply.clean((*self._known, *self._holding.revisions.values()))
