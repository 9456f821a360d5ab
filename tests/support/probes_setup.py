"""A prober over the fake engine of `tenancy_world`, on a clock of its own, and its series.

Not a conftest: tests import what they use.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from artifact_files import FAMILY
from prometheus_client import REGISTRY, Counter, Gauge, generate_latest
from tenant_setup import World, good

from safegene_server.metrics.labels import TenantLabels
from safegene_server.metrics.settings import MetricsSettings
from safegene_server.monitoring.probes import Prober, ProbeSettings, gauges
from safegene_server.tenants import read_prompts
from safegene_vllm.formats.profile import make_profile

PROMPTS = read_prompts()
QUESTION_S = 0.25


@dataclass
class Clock:
    now: float = 100.0
    slept: list[float] = field(default_factory=list)

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


class ProbeWorld(World):
    """Every question takes QUESTION_S of the clock."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.clock = Clock()
        self.replica.complete = self.complete

    def complete(self, prompt: str) -> str:
        self.clock.now += QUESTION_S
        return good(prompt)

    def probing(self, most: int = 100, **settings: Any) -> Prober:
        """A prober of these settings, switched on."""
        made = Prober(
            self.replica,
            ProbeSettings(**{"enabled": True, **settings}),
            PROMPTS,
            TenantLabels(MetricsSettings(max_tenants=most)),
            clock=lambda: self.clock.now,
            sleep=self.clock.sleep,
        )
        self.prober = made
        return made

    def publish(self, name: str, first: float = 1.0) -> str:
        """A tenant's new revision, served at once; its name."""
        if name not in {tenant.name for tenant in self.registry.tenants.list()}:
            self.registry.tenants.add(name, FAMILY.digest, actor="test")
        layers = {entry.layer: first for entry in FAMILY.layers}
        added = self.registry.revisions.add(
            name, make_profile(FAMILY, layers, {"method": "test"}), actor="test"
        )
        self.registry.revisions.set_state(added.id, "ready", actor="test")
        self.registry.rollouts.publish(name, added.number, actor="test")
        asyncio.run(self.replica.apply())
        return added.served_name

    def next(self) -> str | None:
        """The model that the next probe used; None if no tenant is due."""
        before = len(self.replica.requested)
        if not asyncio.run(self.prober.probe_next()):
            return None
        (model,) = {body["model"] for body in self.replica.requested[before:]}
        return str(model)


@pytest.fixture
def probes(tmp_path: Path) -> Iterator[ProbeWorld]:
    for metric in vars(gauges).values():
        if isinstance(metric, Gauge | Counter) and metric is not gauges.ENGINE_SHARE:
            metric.clear()
    made = ProbeWorld(tmp_path)
    yield made
    made.registry.close()


def sample(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"safegene_probe_{name}", labels)


def series_of(tenant: str) -> set[str]:
    """The gauges with a label of a tenant, as a scraper sees them."""
    text = generate_latest(REGISTRY).decode()
    found = re.findall(rf'^safegene_probe_(\w+){{.*tenant="{re.escape(tenant)}".*}}', text, re.M)
    return {name for name in found if not name.startswith("runs_")}
