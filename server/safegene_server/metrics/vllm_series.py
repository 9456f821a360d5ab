"""Removal of vLLM's only unbounded metric from /metrics: `vllm:lora_requests_info`.

Its labels list the adapters that run together, and vLLM removes no series of it. With a registry
every revision and every candidate is an adapter of a new name, so it would grow without end.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from prometheus_client import REGISTRY, CollectorRegistry

UNBOUNDED = "vllm:lora_requests_info"


def remove_unbounded_series(
    registry: CollectorRegistry = REGISTRY,
) -> Callable[[], Awaitable[None]]:
    """Unregister the metric; return a step that clears what vLLM keeps writing to it."""
    # As vLLM finds its own collectors: prometheus_client has no public way.
    found = [c for c in [*registry._collector_to_names] if getattr(c, "_name", "") == UNBOUNDED]
    for collector in found:
        registry.unregister(collector)

    async def clear() -> None:
        for collector in found:
            collector.clear()  # type: ignore[attr-defined]

    return clear
