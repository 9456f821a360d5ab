"""Takes the one metric of vLLM's that has no bound out of /metrics: `vllm:lora_requests_info`.

Its labels list the adapters that run together, and vLLM removes no series of it. With a registry
every change and every trial is an adapter of a new name, so there would be more of them for ever.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from prometheus_client import REGISTRY, CollectorRegistry

UNBOUNDED = "vllm:lora_requests_info"


def withhold(registry: CollectorRegistry = REGISTRY) -> Callable[[], Awaitable[None]]:
    """From now on nobody reads it; what is returned forgets what vLLM goes on writing there."""
    # As vLLM itself finds its collectors: prometheus_client has no other way.
    found = [c for c in [*registry._collector_to_names] if getattr(c, "_name", "") == UNBOUNDED]
    for collector in found:
        registry.unregister(collector)

    async def forget() -> None:
        for collector in found:
            collector.clear()  # type: ignore[attr-defined]

    return forget
