"""A server with a registry: put together at start, taken apart at the end.

`configure_app` while the app is built, so that nobody gets in without a key from the first moment;
`start` once the engine runs. Without settings a server serves the tenants of its command line.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from safegene_server.access.catalog import Catalog, key_digest
from safegene_server.access.limits import Counters
from safegene_server.access.middleware import Access
from safegene_server.access.route_permissions import unclassified
from safegene_server.api import router as api_router
from safegene_server.artifacts import Store
from safegene_server.calibration import CALIBRATE, calibrate
from safegene_server.engine_client import EngineClient
from safegene_server.metrics.labels import TenantLabels
from safegene_server.monitoring.probes import PROBE, Prober, handler
from safegene_server.monitoring.setup import Metrics
from safegene_server.registry import Registry
from safegene_server.replica import CaptureApp, InternalClient, Reconciler
from safegene_server.settings import ServerSettings
from safegene_server.tenants import (
    ONBOARD,
    Jobs,
    TenantContext,
    onboard,
    read_prompts,
    register_declared,
)
from safegene_vllm.errors import ConfigError, ConflictError

logger = logging.getLogger("vllm.safegene_server")

ACTOR = "settings"
"""Who adds and rotates the keys of the settings, in the audit."""


@dataclass
class ServerState:
    """The access check of one app, shut until `start`; no replica and no prober until then.

    `labels` are for whoever else has metrics with a tenant.
    """

    settings: ServerSettings
    metrics: Metrics
    catalog: Catalog = field(default_factory=Catalog)
    counters: Counters = field(default_factory=Counters)
    inside: InternalClient = field(default_factory=InternalClient)
    replica: Reconciler | None = None
    prober: Prober | None = None
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def labels(self) -> TenantLabels:
        return self.metrics.labels

    async def shut(self) -> None:
        """The end of the server: its jobs are left to others, and the registry is told."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        if self.replica is not None:
            await self.replica.stop()
            self.replica.registry.close()


def configure_app(app: FastAPI, settings: ServerSettings) -> ServerState:
    """Routes of tenant life, and the access check around the whole app. Errors: ConfigError."""
    args = getattr(app.state, "args", None)
    door = ServerState(settings, Metrics(settings.metrics, args))
    told = bool(getattr(args, "enable_force_include_usage", False))
    app.include_router(api_router)
    app.add_middleware(CaptureApp, inside=door.inside, whole=app)
    app.add_middleware(
        Access,
        catalog=door.catalog,
        settings=settings.access_settings(usage_told=told),
        counters=door.counters,
        traffic=door.metrics.traffic,
    )
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(whole: FastAPI) -> AsyncIterator[Any]:
        async with inner(whole) as state:
            try:
                yield state
            finally:
                await door.shut()

    app.router.lifespan_context = lifespan
    door.metrics.attach(app, edge=False)
    app.state.safegene_door = door
    app.state.safegene_tenancy = None
    app.state.safegene_prober = None
    if found := unclassified(app):
        logger.warning("routes that only an administrator reaches: %s", ", ".join(found))
    return door


def check_vllm_args(args: Any) -> None:
    """Errors: ConfigError for options of vLLM that go around the registry."""
    faults = []
    if getattr(args, "api_key", None) or os.environ.get("VLLM_API_KEY"):
        faults.append("--api-key (or VLLM_API_KEY): keys are the registry's")
    if getattr(args, "lora_modules", None):
        faults.append("--lora-modules: tenants are the registry's, and their ids too")
    if int(getattr(args, "api_server_count", None) or 1) > 1:
        faults.append("--api-server-count over 1: requests in flight are counted by one process")
    if faults:
        raise ConfigError("with a registry, leave out " + "; ".join(faults) + ".")


async def start(
    door: ServerState,
    gate: EngineClient,
    models: Any,
    make_request: Callable[[str, int, Path], Any],
) -> TenantContext:
    """Open registry and store, add the first keys, follow: from here on keys work.

    Errors: ConfigError, RegistryError and its kinds, StoreError.
    """
    settings = door.settings
    await asyncio.to_thread(read_prompts, settings.tenants.gate.prompts)
    prompts = await asyncio.to_thread(read_prompts, settings.probes.prompts)
    registry = await asyncio.to_thread(Registry, settings.registry_url())
    try:
        store = Store(settings.store, rules=settings.source_rules(), limits=settings.limits())
        await asyncio.to_thread(add_first_keys, registry, settings)
        replica = Reconciler(
            registry=registry,
            store=store,
            gate=gate,
            models=models,
            catalog=door.catalog,
            counters=door.counters,
            inside=door.inside,
            make_request=make_request,
        )
        source = gate.verifier.expected.settings.family
        await replica.start(None if source is None else str(source.absolute()))
    except BaseException:
        registry.close()
        raise
    prober = Prober(replica, settings.probes, prompts, door.labels)
    jobs = Jobs({ONBOARD: onboard, CALIBRATE: calibrate, PROBE: handler(prober)})
    tenancy = TenantContext(replica, registry, store, settings.tenants, jobs)
    door.replica, door.prober = replica, prober
    if settings.tenants.directory is not None:
        await register_declared(tenancy, settings.tenants.directory)
    door.tasks = [
        asyncio.create_task(tenancy.jobs.run(tenancy)),
        asyncio.create_task(prober.run()),
    ]
    return tenancy


def add_first_keys(registry: Registry, settings: ServerSettings) -> None:
    """The keys of the settings that are not there yet; a changed secret is a rotation.

    Not of a key that was rotated or revoked over HTTP since: a secret that leaked and was taken
    away must not come back with the next start. Errors: ConfigError, RegistryError.
    """
    for given in settings.keys:
        secret = given.secret(os.environ)
        try:
            registry.add_key(
                given.name,
                scopes=given.scopes,
                tenants=given.tenants,
                default_tenant=given.default_tenant,
                secret=secret,
                actor=ACTOR,
            )
        except ConflictError:
            known = registry.key(given.name)
            if known.revoked_at is None and known.hash == key_digest(secret).hex():
                continue
            told = registry.audit(target=given.name, action="key.").entries
            if known.revoked_at is None and told and told[0].actor == ACTOR:
                registry.rotate_key(given.name, secret=secret, actor=ACTOR)
            else:
                logger.warning(
                    "key %r of the settings was rotated or revoked over HTTP, so its secret there "
                    "is not used; put the new one there, or take the key out",
                    given.name,
                )
