"""Entry point `vllm.endpoint_plugins: safegene_server`: attaches the routes, verifies the start.

For vLLM's API process; the contract is vllm/plugins/endpoint_plugins/interface.py. An exception in
`init_state` keeps the server from starting.
"""

from __future__ import annotations

import os
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import State

from safegene_server.app import check_vllm_args, configure_app, start_tenants
from safegene_server.engine_client import EngineClient
from safegene_server.engine_routes import LOAD_PATH, load_router, router
from safegene_server.model_choice import serve_named_adapters_only
from safegene_server.monitoring.middleware import MetricsMiddleware
from safegene_server.sagemaker import (
    AdapterKeyMiddleware,
    guard_invocations,
    replace_adapter_routes,
)
from safegene_server.server_state import ServerState, attach_state
from safegene_server.settings import metrics_from_environment, read_settings
from safegene_server.verifier import Verifier, read_verifiable_plan
from safegene_vllm.errors import ConfigError, ReceiptError
from safegene_vllm.plugin.api_process import check_api_process, lora_request


class SafegeneEndpoints:
    """vLLM's EndpointPlugin, loaded for every task: any of them may have protected weights."""

    name = "safegene_server"
    required_tasks: tuple[str, ...] | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Attach our routes, and replace vLLM's load route where runtime LoRA is enabled.

        vLLM 0.28 does not drop a route of the same path, and would keep serving its own.
        """
        app.include_router(router)
        guard_invocations(app)
        settings = read_settings()
        if settings is not None:
            app.router.routes[:] = [r for r in app.router.routes if not _is_runtime_lora(r)]
            replace_adapter_routes(app, registry=True)
            configure_app(app, settings)
            return
        state = attach_state(app, None, metrics_from_environment())
        app.add_middleware(MetricsMiddleware, traffic=state.metrics.traffic)
        stock = [r for r in app.router.routes if _is_load_route(r)]
        if stock:
            app.router.routes[:] = [r for r in app.router.routes if r not in stock]
            app.include_router(load_router)
            replace_adapter_routes(app, registry=False)
            keys = _api_keys(getattr(app.state, "args", None))
            if keys:
                app.add_middleware(AdapterKeyMiddleware, keys=keys)

    async def init_state(self, engine_client: Any, state: State, args: Any) -> None:
        """Verify everything served at start, then put `EngineClient` in front of the engine.

        Errors: ReceiptError with every disagreement; ConfigError, FormatError, BoundsError and
        FamilyMismatchError for bad files or settings.
        """
        if engine_client is None:
            return
        server: ServerState = state.safegene
        plan = read_verifiable_plan(engine_client.vllm_config)
        if plan is None:
            if server.settings is not None:
                raise ConfigError(
                    "a registry needs an engine with a family: start it with `safegene serve "
                    "MODEL --family DIR`."
                )
            return
        serve_named_adapters_only(state)
        models = state.openai_serving_models
        check_api_process(engine_client, models)
        verifier = Verifier(engine_client, models, plan, on_report=server.metrics.on_report)
        report = await verifier.report()
        if not report.ready:
            raise ReceiptError(
                "SafeGene does not let this server start: " + "; ".join(report.faults)
            )
        models.engine_client = EngineClient(engine_client, verifier)
        server.verifier = verifier
        if server.settings is not None:
            check_vllm_args(args)
            await start_tenants(server, server.settings, models.engine_client, models, lora_request)
        server.metrics.start(verifier, server.replica)


def endpoint_plugin() -> SafegeneEndpoints:
    """Make the plugin; vLLM calls this factory."""
    return SafegeneEndpoints()


def _is_load_route(route: Any) -> bool:
    methods = getattr(route, "methods", None) or ()
    return getattr(route, "path", None) == LOAD_PATH and "POST" in methods


def _is_runtime_lora(route: Any) -> bool:
    """Return whether this route loads or unloads adapters, whose ids collide with a registry's."""
    path = getattr(route, "path", "")
    return path in (LOAD_PATH, "/v1/unload_lora_adapter") or path.split("/")[1:2] == ["adapters"]


def _api_keys(args: Any) -> list[str]:
    """Return the keys vLLM itself accepts: --api-key, else VLLM_API_KEY."""
    keys = getattr(args, "api_key", None) or [os.environ.get("VLLM_API_KEY")]
    return [key for key in keys if key]
