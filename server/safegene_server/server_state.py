"""State that the routes of one server process share, at `app.state.safegene`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request

from safegene_server.access.catalog import Catalog
from safegene_server.access.limits import Counters
from safegene_server.access.usage import UsageCounts
from safegene_server.metrics.settings import MetricsSettings
from safegene_server.monitoring.probes import Prober
from safegene_server.monitoring.setup import Metrics
from safegene_server.replica import InternalClient, Reconciler
from safegene_server.settings import ServerSettings
from safegene_server.tenants import TenantContext
from safegene_server.usage_writer import UsageWriter
from safegene_server.verifier import Verifier


@dataclass
class ServerState:
    """One server process. `settings` is None without a registry.

    `verifier` is None until the engine has started, and for an engine without SafeGene;
    `replica`, `tenants`, `prober` and `usage_writer` are None until the registry is followed.
    """

    settings: ServerSettings | None
    metrics: Metrics
    catalog: Catalog = field(default_factory=Catalog)
    counters: Counters = field(default_factory=Counters)
    usage: UsageCounts = field(default_factory=UsageCounts)
    internal_client: InternalClient = field(default_factory=InternalClient)
    verifier: Verifier | None = None
    replica: Reconciler | None = None
    tenants: TenantContext | None = None
    prober: Prober | None = None
    usage_writer: UsageWriter | None = None
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def close(self) -> None:
        """Stop the tasks, which leaves jobs to other replicas, write usage, leave the registry."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        try:
            if self.usage_writer is not None:
                await self.usage_writer.stop()
            if self.replica is not None:
                await self.replica.stop()
                self.replica.registry.close()
        finally:
            await self.metrics.stop()


def attach_state(
    app: FastAPI, settings: ServerSettings | None, metrics_settings: MetricsSettings
) -> ServerState:
    """Put the state of one process on its app, to be closed with the app."""

    def served_models() -> Verifier | None:
        return state.verifier

    args = getattr(app.state, "args", None)
    state = ServerState(settings, Metrics(metrics_settings, args, served_models))
    app.state.safegene = state
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        async with inner(app) as lifespan_state:
            try:
                yield lifespan_state
            finally:
                await state.close()

    app.router.lifespan_context = lifespan
    return state


def state_of(request: Request) -> ServerState:
    """Return the state of the request's app."""
    state: ServerState = request.app.state.safegene
    return state
