"""Puts the metrics of one server together: when its app is built, when it runs, when it ends.

For the entry point. A server without a family of ours counts nothing.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI

from safegene_server.metrics.labels import TenantLabels
from safegene_server.metrics.settings import MetricsSettings
from safegene_server.metrics.tracing import tracing_of
from safegene_server.metrics.traffic import Traffic
from safegene_server.metrics.vllm_series import withhold
from safegene_server.monitoring.applied import Applied, Served
from safegene_server.monitoring.collectors import Collectors, Following
from safegene_server.monitoring.middleware import MetricsMiddleware
from safegene_server.replica import Reconciler
from safegene_server.verifier import Verifier

logger = logging.getLogger("vllm.safegene_server")
Told = TypeVar("Told")


class Metrics:
    """One process's metrics; `labels` and `traffic` are there from the first request on."""

    def __init__(self, settings: MetricsSettings, args: Any) -> None:
        """`args` are vLLM's, or None."""
        self.settings = settings
        self.labels = TenantLabels(settings)
        self.traffic = Traffic(self.labels, refusals=settings.refusals, tracing=tracing_of(args))
        self.observing: Collectors | None = None

    def attach(self, app: FastAPI, *, edge: bool) -> None:
        """End with the app; `edge`: count in front of it, where there is no access check."""
        if edge:
            app.add_middleware(MetricsMiddleware, traffic=self.traffic)
        inner = app.router.lifespan_context

        @asynccontextmanager
        async def lifespan(whole: FastAPI) -> AsyncIterator[Any]:
            async with inner(whole) as state:
                try:
                    yield state
                finally:
                    await self.stop()

        app.router.lifespan_context = lifespan
        app.state.safegene_metrics = self

    def start(self, verifier: Verifier, replica: Reconciler | None) -> None:
        """From here on; called in the server's event loop, once everything is verified.

        Of several API processes the first alone tells of the engine, or it would be told twice.
        """
        models = verifier.models
        self.traffic.protected = verifier.protected
        self.traffic.adapters = lambda: models.lora_requests

        def offered() -> Iterable[Served]:
            if replica is None:
                return [Served(name, name, p) for name, p in verifier.profiles()]
            return [Served(t, r.served_name, r.profile) for t, r in replica.offered()]

        self.traffic.expect(one.tenant for one in offered())
        if not _is_first(verifier.engine):
            return
        base = next((model.name for model in models.base_model_paths), "")
        applied = Applied(self.labels, verifier.expected, offered, base)
        verifier.told = _harmless(applied.take)
        self.observing = Collectors(self.settings.period_s, verifier.report)
        if replica is None:
            self.observing.start()
            return

        def changed(_: None = None) -> None:
            self.traffic.expect(one.tenant for one in offered())
            applied.refresh()

        replica.changed = partial(_harmless(changed), None)
        following = Following(self.labels, replica.registry, replica)
        period_s = self.settings.period_s
        self.observing.start(*following.steps(period_s), (withhold(), period_s))

    async def stop(self) -> None:
        if self.observing is not None:
            await self.observing.stop()


def _harmless(tell: Callable[[Told], None]) -> Callable[[Told], None]:
    """Whoever verifies or serves goes on, whatever the gauges do."""

    def told(what: Told) -> None:
        try:
            tell(what)
        except Exception:
            logger.exception("metrics could not be renewed")

    return told


def _is_first(engine: Any) -> bool:
    """vLLM numbers its API processes from 0; a single one may be none of them."""
    parallel = engine.vllm_config.parallel_config
    return int(getattr(parallel, "_api_process_rank", 0)) <= 0
