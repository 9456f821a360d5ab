"""Metrics of one server process, from the first request to the end of its app."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from safegene_server.metrics.labels import TenantLabels
from safegene_server.metrics.settings import MetricsSettings
from safegene_server.metrics.tracing import tracing_of
from safegene_server.metrics.traffic import ServedModels, Traffic
from safegene_server.metrics.vllm_series import remove_unbounded_series
from safegene_server.monitoring.applied import Applied, Served
from safegene_server.monitoring.collectors import Collectors, RegistryCollector
from safegene_server.replica import Reconciler
from safegene_server.verifier import Report, Verifier

logger = logging.getLogger("vllm.safegene_server")


class Metrics:
    """One process's metrics. `args` are vLLM's, or None.

    `labels` and `traffic` work from the first request on; gauges follow `start`.
    """

    def __init__(
        self,
        settings: MetricsSettings,
        args: Any,
        served_models: Callable[[], ServedModels | None] = lambda: None,
    ) -> None:
        self.settings = settings
        self.args = args
        self.labels = TenantLabels(settings)
        self.traffic = Traffic(
            self.labels,
            refusals=settings.refusals,
            tracing=tracing_of(args),
            served_models=served_models,
        )
        self.collectors: Collectors | None = None
        self._applied: Applied | None = None

    def start(self, verifier: Verifier, replica: Reconciler | None) -> None:
        """Start the gauges, in the server's event loop, once everything is verified.

        Of several API processes only the first exports the engine, or it would be counted twice.
        """

        def offered() -> Iterable[Served]:
            if replica is None:
                return [Served(name, name, p) for name, p in verifier.profiles()]
            return [Served(t, r.served_name, r.profile) for t, r in replica.served()]

        self.traffic.expect(one.tenant for one in offered())
        if not _is_first(verifier.engine):
            return
        base = next((model.name for model in verifier.models.base_model_paths), "")
        self._applied = Applied(self.labels, verifier.plan, offered, base)
        period_s = self.settings.period_s
        self.collectors = Collectors(period_s, verifier.report)
        if replica is None:
            self.collectors.start()
            return
        registry = RegistryCollector(self.labels, replica.registry, replica)
        self.collectors.start(*registry.steps(period_s), (remove_unbounded_series(), period_s))

    def on_report(self, report: Report) -> None:
        """Export a verification; an error here is logged and stops nothing."""
        if self._applied is not None:
            _logged(partial(self._applied.take, report))

    def on_change(self) -> None:
        """Export that other revisions are served; an error here is logged and stops nothing."""
        applied = self._applied
        if applied is None:
            return

        def refresh() -> None:
            self.traffic.expect(one.tenant for one in applied.offered())
            applied.refresh()

        _logged(refresh)

    async def stop(self) -> None:
        if self.collectors is not None:
            await self.collectors.stop()


def _logged(step: Callable[[], None]) -> None:
    try:
        step()
    except Exception:
        logger.exception("metrics could not be updated")


def _is_first(engine: Any) -> bool:
    """Return whether this is the first API process: vLLM numbers several from 0."""
    parallel = engine.vllm_config.parallel_config
    return int(getattr(parallel, "_api_process_rank", 0)) <= 0
