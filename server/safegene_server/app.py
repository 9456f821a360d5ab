"""Setup of a server with a registry.

`configure_app` runs while the app is built, so that no request passes without a key at any time;
`start_tenants` runs once the engine is verified.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from safegene_server.access.catalog import key_digest
from safegene_server.access.middleware import AccessMiddleware
from safegene_server.access.route_permissions import unclassified
from safegene_server.api import router as api_router
from safegene_server.artifacts import Store
from safegene_server.calibration import CALIBRATE, calibrate
from safegene_server.engine_client import EngineClient
from safegene_server.monitoring.probes import PROBE, Prober, probe_handler
from safegene_server.registry import Registry
from safegene_server.replica import CaptureApp, Reconciler
from safegene_server.server_state import ServerState, attach_state
from safegene_server.settings import ServerSettings
from safegene_server.tenants import (
    ONBOARD,
    Jobs,
    TenantContext,
    onboard,
    read_prompts,
    register_declared,
)
from safegene_server.usage_writer import UsageWriter
from safegene_vllm.errors import ConfigError, ConflictError

logger = logging.getLogger("vllm.safegene_server")

ACTOR = "settings"
"""Actor in the audit of keys that the settings add and rotate."""


def configure_app(app: FastAPI, settings: ServerSettings) -> ServerState:
    """Attach the tenant routes, and the access check in front of the app. Errors: ConfigError."""
    state = attach_state(app, settings, settings.metrics)
    usage_forced = bool(getattr(state.metrics.args, "enable_force_include_usage", False))
    app.include_router(api_router)
    app.add_middleware(CaptureApp, internal_client=state.internal_client, whole=app)
    app.add_middleware(
        AccessMiddleware,
        catalog=state.catalog,
        settings=settings.access_settings(usage_forced=usage_forced),
        counters=state.counters,
        traffic=state.metrics.traffic,
        router=app.router,
        usage=state.usage,
    )
    if found := unclassified(app):
        logger.warning("routes that need an administrator's key: %s", ", ".join(found))
    return state


def check_vllm_args(args: Any) -> None:
    """Errors: ConfigError for vLLM options that bypass the registry."""
    problems = []
    if getattr(args, "api_key", None) or os.environ.get("VLLM_API_KEY"):
        problems.append("--api-key (or VLLM_API_KEY): keys are the registry's")
    if getattr(args, "lora_modules", None):
        problems.append("--lora-modules: tenants are the registry's, and their ids too")
    if int(getattr(args, "api_server_count", None) or 1) > 1:
        problems.append("--api-server-count over 1: requests in flight are counted by one process")
    if problems:
        raise ConfigError("with a registry, leave out " + "; ".join(problems) + ".")


async def start_tenants(
    state: ServerState,
    settings: ServerSettings,
    engine_client: EngineClient,
    models: Any,
    make_request: Callable[[str, int, Path], Any],
) -> None:
    """Open registry and store, add the keys of the settings, and follow the registry.

    In place: sets the state's replica, tenants, prober, usage writer and tasks. Keys work from here
    on. Errors: ConfigError, RegistryError and its kinds, StoreError.
    """
    await asyncio.to_thread(read_prompts, settings.tenants.gate.prompts)
    prompts = await asyncio.to_thread(read_prompts, settings.probes.prompts)
    registry = await asyncio.to_thread(Registry, settings.registry_url())
    try:
        store = Store(settings.store, rules=settings.source_rules(), limits=settings.limits())
        await asyncio.to_thread(add_first_keys, registry, settings)
        replica = Reconciler(
            registry=registry,
            store=store,
            engine=engine_client,
            models=models,
            catalog=state.catalog,
            counters=state.counters,
            internal_client=state.internal_client,
            make_request=make_request,
            on_change=state.metrics.on_change,
        )
        source = engine_client.verifier.plan.settings.family
        await replica.start(None if source is None else str(source.absolute()))
    except BaseException:
        registry.close()
        raise
    prober = Prober(replica, settings.probes, prompts, state.metrics.labels)
    tenants = TenantContext(replica, registry, store, settings.tenants)
    jobs = Jobs(tenants, {ONBOARD: onboard, CALIBRATE: calibrate, PROBE: probe_handler(prober)})
    # Set before anything else can fail, so that the end of the app leaves the registry.
    state.replica, state.prober = replica, prober
    state.usage_writer = UsageWriter(state.usage, registry, settings.usage.keep_days)
    state.usage_writer.start()
    if settings.tenants.directory is not None:
        await register_declared(tenants, settings.tenants.directory)
    state.tasks = [
        asyncio.create_task(jobs.run()),
        asyncio.create_task(prober.run()),
    ]
    state.tenants = tenants


def add_first_keys(registry: Registry, settings: ServerSettings) -> None:
    """Add the keys of the settings that are missing; rotate those whose secret changed.

    A key that was rotated or revoked over HTTP is left alone: a leaked secret must not become
    valid again with the next start. Errors: ConfigError, RegistryError.
    """
    for given in settings.keys:
        secret = given.secret(os.environ)
        try:
            registry.keys.add(
                given.name,
                scopes=given.scopes,
                tenants=given.tenants,
                default_tenant=given.default_tenant,
                secret=secret,
                actor=ACTOR,
            )
        except ConflictError:
            known = registry.keys.get(given.name)
            if known.revoked_at is None and known.hash == key_digest(secret).hex():
                continue
            history = registry.audit.page(target=given.name, action="key.").entries
            if known.revoked_at is None and history and history[0].actor == ACTOR:
                registry.keys.rotate(given.name, secret=secret, actor=ACTOR)
            else:
                logger.warning(
                    "key %r of the settings was rotated or revoked over HTTP, so its secret there "
                    "is not used; put the new one there, or take the key out",
                    given.name,
                )
