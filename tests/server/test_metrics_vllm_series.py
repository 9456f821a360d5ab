"""vLLM's metric without a bound: with a registry it is out of /metrics, and forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, Gauge, generate_latest

from safegene_server.metrics.settings import MetricsSettings
from safegene_server.metrics.vllm_series import UNBOUNDED, remove_unbounded_series
from safegene_server.monitoring.setup import Metrics
from safegene_vllm.settings import EnginePlan, Settings


def as_vllm_makes_it(registry: CollectorRegistry) -> Gauge:
    names = ["max_lora", "waiting_lora_adapters", "running_lora_adapters"]
    return Gauge(UNBOUNDED, "Running stats on lora requests.", names, registry=registry)


def test_the_series_is_removed_and_later_values_are_cleared() -> None:
    registry = CollectorRegistry()
    gauge = as_vllm_makes_it(registry)
    other = Gauge("vllm:num_requests_running", "...", ["engine"], registry=registry)
    other.labels("0").set(1)
    gauge.labels("2", "", "acme@1").set_to_current_time()
    clear = remove_unbounded_series(registry)
    for number in range(2, 100):
        gauge.labels("2", "", f"acme@{number},@candidate/{number}").set_to_current_time()
    asyncio.run(clear())
    assert gauge._metrics == {}
    text = generate_latest(registry).decode()
    assert UNBOUNDED not in text and "vllm:num_requests_running" in text


def test_an_engine_without_adapters_has_none() -> None:
    asyncio.run(remove_unbounded_series(CollectorRegistry())())


@pytest.fixture
def gauge() -> Iterator[Gauge]:
    made = as_vllm_makes_it(REGISTRY)
    yield made
    if made in REGISTRY._collector_to_names:
        REGISTRY.unregister(made)


@pytest.mark.parametrize("with_registry", [True, False])
def test_a_server_with_a_registry_withholds_it(gauge: Gauge, with_registry: bool) -> None:
    async def nothing() -> None:
        return None

    engine = SimpleNamespace(vllm_config=SimpleNamespace(parallel_config=SimpleNamespace()))
    verifier: Any = SimpleNamespace(
        engine=engine,
        models=SimpleNamespace(lora_requests={}, base_model_paths=[]),
        plan=EnginePlan(Settings(), None, None),
        protected=lambda served: True,
        profiles=lambda: [],
        report=nothing,
    )
    replica: Any = SimpleNamespace(
        registry=SimpleNamespace(figures=lambda: None),
        served=lambda: [],
        faults=lambda: (),
        version=1,
        lag=SimpleNamespace(known=1, seconds=lambda: 0.0),
    )

    async def run() -> None:
        metrics = Metrics(MetricsSettings(), None)
        gauge.labels("2", "", "acme@1").set(1)
        metrics.start(verifier, replica if with_registry else None)
        await asyncio.sleep(0.05)
        await metrics.stop()

    asyncio.run(run())
    assert (UNBOUNDED.encode() in generate_latest(REGISTRY)) is not with_registry
    assert (gauge._metrics == {}) is with_registry
