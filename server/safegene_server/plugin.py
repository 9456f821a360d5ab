"""Entry point `vllm.endpoint_plugins: safegene_server`: attaches the routes, verifies the start.

For vLLM's API process; the contract is vllm/plugins/endpoint_plugins/interface.py. An exception in
`init_state` keeps the server from starting, which is the point.
"""

from __future__ import annotations

import os
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import State

from safegene_server.app import check_vllm_args, configure_app, start
from safegene_server.engine_client import EngineClient
from safegene_server.engine_routes import LOAD_PATH, load_router, router
from safegene_server.model_choice import serve_named_adapters_only
from safegene_server.monitoring.setup import Metrics
from safegene_server.sagemaker import (
    AdaptersNeedKey,
    guard_invocations,
    replace_adapter_routes,
)
from safegene_server.settings import metrics_alone, read_settings
from safegene_server.verifier import Verifier, read_expected
from safegene_vllm.errors import ConfigError, ReceiptError
from safegene_vllm.plugin.api_process import check_api_process, lora_request


class SafegeneEndpoints:
    """vLLM's EndpointPlugin. It is loaded for every task: weights may be protected in any."""

    name = "safegene_server"
    required_tasks: tuple[str, ...] | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Our routes; vLLM's load route is replaced where runtime LoRA has put it, and only there.

        vLLM 0.28 does not drop the route it had, and would go on answering with it.
        """
        app.include_router(router)
        guard_invocations(app)
        settings = read_settings()
        if settings is not None:
            app.router.routes[:] = [r for r in app.router.routes if not _is_runtime_lora(r)]
            replace_adapter_routes(app, registry=True)
            configure_app(app, settings)
            return
        Metrics(metrics_alone(), getattr(app.state, "args", None)).attach(app, edge=True)
        stock = [r for r in app.router.routes if _is_load_route(r)]
        if stock:
            app.router.routes[:] = [r for r in app.router.routes if r not in stock]
            app.include_router(load_router)
            replace_adapter_routes(app, registry=False)
            keys = _api_keys(getattr(app.state, "args", None))
            if keys:
                app.add_middleware(AdaptersNeedKey, keys=keys)

    async def init_state(self, engine_client: Any, state: State, args: Any) -> None:
        """Verify everything that is served at start, then put the gate before the engine.

        Errors: ReceiptError with every disagreement; ConfigError, FormatError, BoundsError and
        FamilyMismatchError as the files give cause.
        """
        state.safegene = None
        if engine_client is None:
            return
        expected = read_expected(engine_client.vllm_config)
        if expected is None:
            if getattr(state, "safegene_door", None) is not None:
                raise ConfigError(
                    "a registry needs an engine with a family: start it with `safegene serve "
                    "MODEL --family DIR`."
                )
            return
        serve_named_adapters_only(state)
        models = state.openai_serving_models
        check_api_process(engine_client, models)
        verifier = Verifier(engine_client, models, expected)
        report = await verifier.report()
        if not report.ready:
            raise ReceiptError(
                "SafeGene does not let this server start: " + "; ".join(report.faults)
            )
        models.engine_client = EngineClient(engine_client, verifier)
        state.safegene = verifier
        door = getattr(state, "safegene_door", None)
        if door is not None:
            check_vllm_args(args)
            state.safegene_tenancy = await start(door, models.engine_client, models, lora_request)
            state.safegene_prober = door.prober
        metrics = getattr(state, "safegene_metrics", None)
        if metrics is not None:
            metrics.start(verifier, None if door is None else door.replica)


def endpoint_plugin() -> SafegeneEndpoints:
    """The factory vLLM calls."""
    return SafegeneEndpoints()


def _is_load_route(route: Any) -> bool:
    methods = getattr(route, "methods", None) or ()
    return getattr(route, "path", None) == LOAD_PATH and "POST" in methods


def _is_runtime_lora(route: Any) -> bool:
    """vLLM's and SageMaker's ways to load and unload, whose ids would collide with a registry's."""
    path = getattr(route, "path", "")
    return path in (LOAD_PATH, "/v1/unload_lora_adapter") or path.split("/")[1:2] == ["adapters"]


def _api_keys(args: Any) -> list[str]:
    """The keys vLLM itself accepts: --api-key, else VLLM_API_KEY."""
    keys = getattr(args, "api_key", None) or [os.environ.get("VLLM_API_KEY")]
    return [key for key in keys if key]
