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
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from safegene_server.access.catalog import Catalog
from safegene_server.access.limits import Counters
from safegene_server.artifacts import Store
from safegene_server.engine_client import EngineClient
from safegene_server.error_responses import EngineDownError, plain
from safegene_server.metrics import definitions
from safegene_server.registry import Registry, Revision, Snapshot, watch
from safegene_server.replica.artifact_cache import ArtifactCache
from safegene_server.replica.candidates import Candidates
from safegene_server.replica.heartbeat import ACTOR, BEAT_S, StatusReporter, Told, receipt_of
from safegene_server.replica.internal_client import InternalClient
from safegene_server.replica.lag import Lag, Waiting
from safegene_server.replica.loaded_revisions import LoadedRevisions
from safegene_server.replica.view import view_of
from safegene_vllm.errors import (
    ConfigError,
    RegistryDownError,
    SafegeneError,
)
from safegene_vllm.formats.family import FamilyHeader
from safegene_vllm.formats.profile import make_profile

logger = logging.getLogger("vllm.safegene_server")

AFTER_S = 0.05
"""Before a change is reported: whoever made it is answered first."""
RETRY_S = 5.0
DRIFT_S = 30.0
CLEAN_S = 600.0
FETCH_S = 30.0
"""How long the start waits for adapters that must be fetched; they come later all the same."""


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
    ) -> None:
        """Errors: ConfigError for an engine that has no family."""
        header = gate.verifier.expected.header
        if header is None:
            raise ConfigError("a registry needs an engine with a family; set safegene.family.")
        self.header: FamilyHeader = header
        self.registry, self.gate, self.models = registry, gate, models
        self.catalog, self.counters, self.inside = catalog, counters, inside
        self.version = 0
        self.lag = Lag()
        self.changed: Callable[[], None] = lambda: None
        """Called when other revisions are offered than before; set by whoever wants to know."""
        self._teller = StatusReporter(registry, self._recall)
        self._holding = LoadedRevisions(gate, models, make_request, self._teller)
        self._tried: set[int] = set()
        self._warm: set[int] = set()
        self._trials = Candidates(gate, models, make_request)
        self._serving: dict[str, int] = {}
        self._waiting = Waiting()
        self._known: tuple[Revision, ...] = ()
        self._faults: tuple[str, ...] = ("it has not followed the registry yet",)
        self._drift: tuple[str, ...] = ()
        self._lock = asyncio.Lock()
        self._news = asyncio.Event()
        self._loose = asyncio.Event()
        self.supply = ArtifactCache(store, header, self._news.set, RETRY_S)
        self._stop = threading.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def id(self) -> str:
        """This replica in the registry; empty before it has joined."""
        return self._teller.id

    # -- life ------------------------------------------------------------------------------------

    async def start(self, family_source: str | None) -> None:
        """Join the registry, apply what is published, then keep following it.

        A revision that cannot be applied leaves the server unready, not down.
        Errors: RegistryError and its kinds, EngineDownError.
        """
        await asyncio.to_thread(self.registry.add_family, self.header, family_source, actor=ACTOR)
        await self._teller.join(self.version, self.faults())
        await self.reconcile()
        loop = asyncio.get_running_loop()
        threading.Thread(
            target=self._listen, args=(loop,), name="safegene-registry", daemon=True
        ).start()
        self._tasks = [
            asyncio.create_task(self._forever(self._follow, RETRY_S)),
            asyncio.create_task(self._forever(self._beat, BEAT_S)),
            asyncio.create_task(self._forever(self._look, DRIFT_S)),
            asyncio.create_task(self._forever(self._clean, CLEAN_S)),
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
        return self._faults + self._drift

    async def call(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> httpx.Response:
        """A request to this server's own app, past the access check."""
        return await self.inside.call(method, path, body)

    # -- following -------------------------------------------------------------------------------

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
            snapshot = await asyncio.to_thread(self.registry.snapshot)
            self.lag.hear(snapshot.version)
            wanted = [r for r in snapshot.revisions if r.profile.family == self.header.digest]
            offered = set(self._serving.values())
            late = [revision.id for revision in wanted if revision.id not in offered]
            self._waiting.expect(late, min(begun_s, self.lag.heard_s(snapshot.version)))
            self.supply.fetches.keep(late)
            if any(number not in self._holding.revisions for number in late):
                # Keys, limits and who is gone wait for no adapter.
                self._offer(snapshot, wanted)
            faults, coming = await self._bring(wanted)
            self._offer(snapshot, wanted)
            self._tried -= {revision.id for revision in wanted}
            self._warm = {revision.id for revision in (*wanted, *snapshot.previous)}
            self._known = (*snapshot.revisions, *snapshot.previous)
            self._faults = tuple(faults)
            if not faults and not coming:
                self.version = snapshot.version
                self.lag.apply(snapshot.version)
            elif not self.version:
                # Never level so far, so not ready; later on the former revisions are served.
                self._faults += tuple(f"{name}: it is being fetched" for name in coming)
        self._loose.set()

    async def _bring(self, wanted: Iterable[Revision]) -> tuple[list[str], list[str]]:
        """What can be had now into the engine; the faults, and the names of what is on its way."""
        faults: list[str] = []
        coming: list[str] = []
        for revision in wanted:
            if revision.id in self._holding.revisions:
                continue
            try:
                path = await self.supply.here(revision)
                if path is None:
                    coming.append(revision.served_name)
                else:
                    await self._holding.add(revision, path)
                    await self._teller.live(self.version, self.faults())
            except (SafegeneError, EngineDownError) as error:
                faults.append(f"{revision.served_name}: {plain(error)}")
                logger.error("%s is not applied here: %s", revision.served_name, plain(error))
        return faults, coming

    async def load(self, revision: Revision) -> None:
        """Bring a revision into the engine, verified, without offering it; it stays until `unload`,
        or until it has been published and superseded.

        Errors: those of staging, AdapterRejectedError, ReceiptError, EngineDownError.
        """
        self._tried.add(revision.id)
        try:
            async with self._lock:
                if revision.id in self._holding.revisions:
                    return
            path = await asyncio.to_thread(self.supply.directory, revision)
            async with self._lock:
                await self._holding.add(revision, path)
        except BaseException:
            self._tried.discard(revision.id)
            raise

    async def unload(self, revision: Revision) -> None:
        """The trial is over; it stays if it has been published meanwhile."""
        async with self._lock:
            self._tried.discard(revision.id)
            await self._let_go()
            await self._tell()

    async def begin_trial(self, revision: Revision, coefficients: Sequence[float]) -> str:
        """Load the adapter of `revision` with other coefficients, one per layer of the base, for
        `call` alone; the name to ask. Nobody is offered it, and the registry never hears of it.

        Errors: BoundsError; those of `load`.
        """
        name = self._trials.new_name()
        # A profile of its own has a directory of its own, which goes with the trial.
        profile = make_profile(self.header, coefficients, {"method": "trial", "name": name})
        path = await asyncio.to_thread(self.supply.directory, replace(revision, profile=profile))

        def clear() -> None:
            self.supply.store.drop(revision.adapter_digest, profile.digest)

        await self._trials.begin(name, path, clear)
        return name

    async def end_trial(self, name: str) -> None:
        """Out of the engine and off the disk; nothing happens if it has ended.

        Errors: EngineDownError or what the engine raises; StoreError.
        """
        await self._trials.end(name)

    def offered(self) -> list[tuple[str, Revision]]:
        """Tenants and the revisions that their names lead to here, the first published first."""
        held = self._holding.revisions
        return sorted(
            ((tenant, held[number]) for tenant, number in self._serving.items()),
            key=lambda one: one[1].id,
        )

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
        held = self._holding.revisions
        return {tenant: held[number].served_name for tenant, number in self._serving.items()}

    def keeping(self, served: str) -> AbstractContextManager[None]:
        """A revision that is held stays meanwhile, as it does while a tenant's request runs."""
        return self._holding.keeping(served)

    def _offer(self, snapshot: Snapshot, wanted: Iterable[Revision]) -> None:
        """Switch every alias whose revision is held; the others stay where they are."""
        before = dict(self._serving)
        names = {tenant.name for tenant in snapshot.tenants}
        published = {revision.tenant for revision in wanted}
        for revision in wanted:
            if revision.id in self._holding.revisions:
                self._serving[revision.tenant] = revision.id
        for tenant in list(self._serving):
            if tenant not in names or tenant not in published:
                del self._serving[tenant]
        base = [model.name for model in self.models.base_model_paths]
        self.catalog.replace(view_of(snapshot, self.header.digest, self.serving(), base))
        if self._serving != before:
            for _, number in self._serving.items() - before.items():
                definitions.APPLY_SECONDS.observe(self.lag.clock() - self._waiting.pop_s(number))
            self.changed()

    async def _let_go(self) -> bool:
        """Remove what is not published, offered, tried or a way back, once none is in flight;
        whether anything went.
        """
        gone = False
        kept = self._warm | self._tried | set(self._serving.values())
        for number, revision in list(self._holding.revisions.items()):
            name = revision.served_name
            if number in kept or self._holding.is_kept(name) or self.counters.in_flight(name):
                continue
            await self._holding.remove(number)
            gone = True
        return gone

    async def _tell(self) -> None:
        await self._teller.tell(self.version, self.faults())

    async def _recall(self) -> dict[int, Told]:
        """The receipts of all that is held. Errors: EngineDownError, ReceiptError."""
        held = self._holding.revisions
        ranks = await self.gate.verifier.ask() if held else []
        return {number: receipt_of(ranks, number) for number in held}

    # -- loops -----------------------------------------------------------------------------------

    def _listen(self, loop: asyncio.AbstractEventLoop) -> None:
        """In a thread: wake `_follow` at every new version."""
        for version in watch(self.registry, self._stop):
            self.lag.hear(version)
            if version != self.version and not loop.is_closed():
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
            if await self._let_go():
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

    async def _forever(self, step: Callable[[], Any], pause_s: float) -> None:
        while True:
            try:
                await step()
            except RegistryDownError as error:
                logger.warning("the registry does not answer, served on as before: %s", error)
                await asyncio.sleep(pause_s)
            except (SafegeneError, EngineDownError) as error:
                logger.error("cannot follow the registry: %s", plain(error))
                await asyncio.sleep(pause_s)
            except Exception:
                logger.exception("cannot follow the registry")
                await asyncio.sleep(pause_s)
