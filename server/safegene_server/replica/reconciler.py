"""Reconciliation of one engine and its catalog with the registry.

Every change has the same order: stage, validate, load, receipts from every rank, then the alias. A
superseded revision is unloaded once it has no requests in flight.
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
from safegene_server.error_responses import EngineDownError, plain, public_message
from safegene_server.metrics import definitions
from safegene_server.registry import History, Identity, Position, Registry, Revision, Seen, Snapshot
from safegene_server.replica.aliases import Aliases
from safegene_server.replica.artifact_cache import ArtifactCache
from safegene_server.replica.candidates import Candidates
from safegene_server.replica.heartbeat import (
    ACTOR,
    BEAT_S,
    RevisionReceipts,
    StatusReporter,
    receipt_of,
)
from safegene_server.replica.internal_client import InternalClient
from safegene_server.replica.lag import Lag, Waiting
from safegene_server.replica.loaded_revisions import LoadedRevisions
from safegene_server.replica.loops import RETRY_S, forever, listen
from safegene_server.replica.retention import QUIET_S, RESTORED, Retention
from safegene_server.replica.view import view_of
from safegene_vllm.errors import ConfigError, RestoredError, SafegeneError
from safegene_vllm.formats.family import FamilyHeader

logger = logging.getLogger("vllm.safegene_server")

AFTER_S = 0.05
"""Delay of the report of a change, so that the response to its request goes first."""
DRIFT_S, CLEAN_S, FETCH_S = 30.0, 600.0, 30.0
"""FETCH_S: how long the start waits for missing adapters; later ones load in the background."""
DRAIN_S, MAX_PAUSE_S = 30.0, 2.0
"""Longest wait of a load for requests on other content under its id or name, and longest pause."""


class Reconciler:
    """Reconciler of one replica; `make_request(name, id, path)` builds a LoRARequest."""

    def __init__(
        self,
        *,
        registry: Registry,
        store: Store,
        engine: EngineClient,
        models: Any,
        catalog: Catalog,
        counters: Counters,
        internal_client: InternalClient,
        make_request: Callable[[str, int, Path], Any],
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_change` is called when other revisions are served than before.

        Errors: ConfigError for an engine that has no family.
        """
        header = engine.verifier.plan.header
        if header is None:
            raise ConfigError("a registry needs an engine with a family; set safegene.family.")
        self.header: FamilyHeader = header
        self.registry, self.engine, self.models = registry, engine, models
        self.catalog, self.counters, self.internal_client = catalog, counters, internal_client
        self.version = 0
        self.lag = Lag()
        self.on_change = on_change
        self._history = History(registry)
        self._losses = 0
        self._reporter = StatusReporter(registry, self._introduce, self._recall)
        self._family_source: str | None = None
        self._loaded = LoadedRevisions(engine, models, make_request, self._reporter)
        self._aliases = Aliases(self._loaded.revisions)
        self._retention = Retention(self._loaded, self._aliases, counters)
        self._blocking: set[Identity] = set()
        self._waiting = Waiting()
        self._known: tuple[Revision, ...] = ()
        self._errors: tuple[str, ...] = ("the registry has not been applied yet",)
        self._drift: tuple[str, ...] = ()
        self._lock = asyncio.Lock()
        self._changes = asyncio.Event()
        self._report_due = asyncio.Event()
        self.artifacts = ArtifactCache(store, header, self._changes.set, RETRY_S)
        self._candidates = Candidates(engine, models, make_request, self.artifacts)
        self._stop = threading.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def id(self) -> str:
        """Id of this replica in the registry; empty before it has joined."""
        return self._reporter.id

    async def start(self, family_source: str | None) -> None:
        """Join the registry, apply what is published, then keep following it.

        A revision that cannot be applied leaves the server unready, not down.
        Errors: RegistryError and subclasses, EngineDownError.
        """
        self._family_source = family_source
        await self._reporter.join(self.version, self.problems(), None)
        await self.reconcile()
        loop = asyncio.get_running_loop()
        threading.Thread(
            target=listen,
            args=(self._history, self._stop, partial(self._on_version, loop)),
            name="safegene-registry",
            daemon=True,
        ).start()
        self._tasks = [
            asyncio.create_task(forever(self._follow, RETRY_S)),
            asyncio.create_task(forever(self._beat, BEAT_S)),
            asyncio.create_task(forever(self._check_drift, DRIFT_S)),
            asyncio.create_task(forever(self._clean, CLEAN_S)),
        ]

    async def stop(self) -> None:
        """Stop following and leave the registry; loaded revisions stay served."""
        self._stop.set()
        self.artifacts.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            await asyncio.to_thread(self.registry.replicas.leave, self.id, actor=ACTOR)
        except SafegeneError as error:
            logger.warning(
                "could not deregister from the registry; it will time out there: %s", error
            )

    def problems(self) -> tuple[str, ...]:
        """Reasons why this replica is not ready; empty if it serves all that is published."""
        restored = () if self._losses == self._history.losses else (RESTORED,)
        return restored + self._errors + tuple(map(public_message, self._drift))

    async def call(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> httpx.Response:
        """Send a request to this server's own app, past the access check."""
        return await self.internal_client.call(method, path, body)

    async def reconcile(self) -> None:
        """Apply the current state of the registry, waiting up to FETCH_S for missing adapters.

        Errors: RegistryDownError (nothing changes then).
        """
        await self.apply()
        if self.artifacts.fetches:
            await self.artifacts.fetches.settled(FETCH_S)
            await self.apply()
        async with self._lock:
            await self._report()

    async def apply(self) -> None:
        """Apply the current state of the registry to engine and catalog.

        Missing adapters are downloaded and applied later. The report follows in the background.

        Errors: RegistryDownError (nothing changes then).
        """
        async with self._lock:
            started_s = self.lag.clock()
            snapshot, losses = await asyncio.to_thread(self._history.snapshot)
            self.lag.observe(snapshot.version, losses)
            wanted = [r for r in snapshot.revisions if r.profile.family == self.header.digest]
            retained = {revision.identity for revision in (*wanted, *snapshot.previous)}
            restored = losses != self._losses
            withdrawn = self._aliases.withdraw(wanted, retained if restored else None)
            if restored or withdrawn:
                self.version, self._errors = 0, (RESTORED,)
            if restored:
                self._reporter.restored()
            served = self._aliases.targets()
            unserved = [r.identity for r in wanted if r.identity not in served]
            self._waiting.expect(unserved, min(started_s, self.lag.heard_s(snapshot.version)))
            self.artifacts.fetches.keep(unserved)
            if restored or withdrawn or any(one not in self._loaded.revisions for one in unserved):
                # Keys, limits and retired tenants do not wait for an adapter.
                self._switch_aliases(snapshot, wanted)
            definitions.replica_gauges().losses.inc(losses - self._losses)
            self._losses, self._retention.warm = losses, retained
            self._blocking = await self._retention.unload_conflicting(wanted)
            errors, pending = await self._load_missing(wanted)
            self._switch_aliases(snapshot, wanted)
            self._retention.under_test -= {revision.identity for revision in wanted}
            self._known = (*snapshot.revisions, *snapshot.previous)
            self._errors = tuple(errors)
            if not errors and not pending:
                self.version = snapshot.version
                self.lag.apply(snapshot.version, losses)
            elif not self.version:
                # Never up to date so far, so not ready; later the previous revisions stay served.
                self._errors += tuple(
                    f"{name}: its adapter is being downloaded" for name in pending
                )
        self._report_due.set()

    async def _load_missing(self, wanted: Iterable[Revision]) -> tuple[list[str], list[str]]:
        """Load what is available; return the errors, and the names of what is being downloaded."""
        errors: list[str] = []
        pending: list[str] = []
        for revision in wanted:
            if revision.identity in self._loaded.revisions:
                continue
            try:
                path = await self.artifacts.find(revision)
                if path is None:
                    pending.append(revision.served_name)
                else:
                    await self._loaded.add(revision, path)
                    await self._reporter.heartbeat(*self._state())
            except (SafegeneError, EngineDownError) as error:
                errors.append(f"{revision.served_name}: {public_message(error)}")
                logger.error(
                    "could not load %s, so its tenant stays as it is; trying again: %s",
                    revision.served_name,
                    plain(error),
                )
        return errors, pending

    async def load(self, revision: Revision, path: Path | None = None) -> None:
        """Load and verify a revision without serving it.

        It stays until `unload`, or until it has been published and superseded. `path` is its
        directory in the store, if it is known.

        Errors: those of staging, AdapterRejectedError, ReceiptError, EngineDownError; RestoredError
        while other content, of a registry that was restored, is in use under its id or name.
        """
        self._retention.under_test.add(revision.identity)
        try:
            async with self._lock:
                if revision.identity in self._loaded.revisions:
                    return
            if path is None:
                path = await asyncio.to_thread(self.artifacts.directory, revision)
            until_s, pause_s = self.lag.clock() + DRAIN_S, QUIET_S
            while True:
                async with self._lock:
                    blocking = await self._retention.unload_conflicting([revision])
                    if not blocking or self.lag.clock() >= until_s:
                        await self._loaded.add(revision, path)
                        return
                # The registry was restored, perhaps unnoticed here so far.
                await self.apply()
                if blocking & self._retention.warm:
                    until_s = self.lag.clock()
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, MAX_PAUSE_S)
        except BaseException:
            self._retention.under_test.discard(revision.identity)
            raise

    async def unload(self, revision: Revision) -> None:
        """End what `load` began; the revision stays if it has been published meanwhile."""
        async with self._lock:
            self._retention.under_test.discard(revision.identity)
            await self._retention.remove(list(self._loaded.revisions))
            await self._report()

    async def begin_candidate(self, revision: Revision, coefficients: Sequence[float]) -> str:
        """As `Candidates.begin`, with one coefficient per layer of the base."""
        return await self._candidates.begin(revision, coefficients)

    async def end_candidate(self, name: str) -> None:
        """Unload a candidate, if any, and remove its files. Errors: the engine's; StoreError."""
        await self._candidates.end(name)

    def served(self) -> list[tuple[str, Revision]]:
        """Tenants and the revisions that serve them here, oldest revision first."""
        return self._aliases.served()

    def free_slots(self) -> int:
        """Number of free LoRA slots on the device."""
        slots = int(self.engine.vllm_config.lora_config.max_loras)
        return max(0, slots - len(self._loaded.revisions) - len(self._candidates))

    def in_flight(self) -> int:
        """Number of running tenant requests in this process."""
        return self.counters.running.total()

    def schedules_by_priority(self) -> bool:
        """Whether this engine accepts a `priority` with a request."""
        return bool(self.engine.vllm_config.scheduler_config.policy == "priority")

    def serving(self) -> dict[str, str]:
        """Map each tenant to the revision that serves it here, `tenant@N`."""
        return self._aliases.serving()

    def in_use(self, served: str) -> AbstractContextManager[None]:
        """Keep a revision loaded meanwhile, as a running request of a tenant does."""
        return self._retention.in_use(served)

    def _switch_aliases(self, snapshot: Snapshot, wanted: Sequence[Revision]) -> None:
        """Switch every alias whose revision is loaded, and update the catalog."""
        changed, new = self._aliases.switch(snapshot, wanted)
        view = view_of(snapshot, self.header.digest, self.serving(), self.models)
        self.catalog.replace(view)
        for one in new:
            definitions.APPLY_SECONDS.observe(self.lag.clock() - self._waiting.pop_s(one))
        if changed:
            self.on_change()

    def _state(self) -> tuple[int, tuple[str, ...], Position | None]:
        """Version served, why it is not a later one, and the registry's position of both."""
        seen = self._history.position
        version = self.version if self._losses == self._history.losses else 0
        return version, self.problems(), seen

    async def _introduce(self) -> None:
        """Add the family to the registry. Errors: RegistryError and subclasses."""
        source = self._family_source
        await asyncio.to_thread(self.registry.families.add, self.header, source, actor=ACTOR)

    async def _report(self) -> None:
        try:
            await self._reporter.report(*self._state())
        except RestoredError:
            # Reported once the restored registry is applied.
            self._changes.set()

    async def _recall(self) -> dict[Identity, RevisionReceipts]:
        """Receipts of all loaded revisions. Errors: EngineDownError, ReceiptError."""
        held = self._loaded.revisions
        ranks = await self.engine.verifier.receipts() if held else []
        return {one: receipt_of(ranks, one.id) for one in held}

    def _on_version(self, loop: asyncio.AbstractEventLoop, seen: Seen) -> None:
        """In the watcher thread: wake `_follow` at every new version and after a restore."""
        self.lag.observe(seen.version, seen.losses)
        applied = self.version, self._losses
        if (seen.version, seen.losses) != applied and not loop.is_closed():
            loop.call_soon_threadsafe(self._changes.set)

    async def _follow(self) -> None:
        """Apply one change, or retry what failed."""
        try:
            async with asyncio.timeout(RETRY_S if self._errors else None):
                await self._changes.wait()
        except TimeoutError:
            pass
        self._changes.clear()
        try:
            await self.apply()
        except BaseException:
            # A version is notified only once, so set the event again.
            self._changes.set()
            raise

    async def _beat(self) -> None:
        """Send a heartbeat, soon after a change, and then unload unused revisions."""
        with suppress(TimeoutError):
            async with asyncio.timeout(BEAT_S):
                await self._report_due.wait()
        if self._report_due.is_set():
            await asyncio.sleep(AFTER_S)
        self._report_due.clear()
        async with self._lock:
            await self._report()
            unused = self._retention.unused(self._loaded.revisions.keys() - self._blocking)
        if self._retention.unused(self._blocking):
            # `apply` unloads them, and loads the revisions that they conflict with.
            self._changes.set()
        if unused:
            await asyncio.sleep(QUIET_S)
            async with self._lock:
                if await self._retention.remove(unused):
                    await self._report()

    async def _check_drift(self) -> None:
        """Check that the engine still holds what its receipts state."""
        await asyncio.sleep(DRIFT_S)
        report = await self.engine.verifier.report()
        if report.faults != self._drift:
            for error in report.faults:
                logger.error("the engine has drifted from its receipts: %s", error)
            self._drift = report.faults
            async with self._lock:
                await self._report()

    async def _clean(self) -> None:
        """Remove local files of revisions that are not served, rolled back to or loaded."""
        await asyncio.sleep(CLEAN_S)
        await self.artifacts.clean((*self._known, *self._loaded.revisions.values()))
