"""Changes of metrics: differences, since all tests share one process and registry."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from prometheus_client import REGISTRY

from safegene_server.metrics import definitions

Key = tuple[str, tuple[tuple[str, str], ...]]
Found = dict[Key, float]


def key(name: str, **labels: str) -> Key:
    return name, tuple(sorted(labels.items()))


def values(prefix: str = "safegene_") -> Found:
    """Every sample of our own metrics that is not about times of creation."""
    return {
        key(sample.name, **sample.labels): sample.value
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name.startswith(prefix) and not sample.name.endswith("_created")
    }


@dataclass
class Served:
    """Served models: names of adapters, and which of them have a profile."""

    names: Set[str] = frozenset()
    protected: Callable[[str], bool] = lambda served: True

    def adapters(self) -> Set[str]:
        return self.names


class Grown:
    """`by(name, **labels)`: how much a sample has grown; `everything` that has, but for times."""

    def __init__(self) -> None:
        self.before = values()
        self.after: Found = {}

    def by(self, name: str, **labels: str) -> float:
        at = key(name, **labels)
        return self.after.get(at, 0.0) - self.before.get(at, 0.0)

    def everything(self) -> dict[str, float]:
        """Counts and counters as `name{a=b}`: growth, without buckets and sums of seconds."""
        grown = {}
        for at, value in self.after.items():
            name, labels = at
            more = value - self.before.get(at, 0.0)
            if more and not name.endswith(("_bucket", "_sum")):
                inside = ",".join(f"{k}={v}" for k, v in labels)
                grown[f"{name.removeprefix('safegene_')}{{{inside}}}"] = more
        return grown


@contextmanager
def growth() -> Iterator[Grown]:
    found = Grown()
    yield found
    found.after = values()


@pytest.fixture
def clean() -> None:
    """Empty the gauges of a set of tenants, whatever an earlier test has served."""
    for gauge in (
        definitions.REVISION_INFO,
        definitions.GAIN_NORM,
        definitions.COEFFICIENT,
        definitions.ACTIVE_LAYERS,
        definitions.PUBLISHED_AT,
        definitions.JOBS,
        definitions.BUILD_INFO,
    ):
        gauge.clear()
