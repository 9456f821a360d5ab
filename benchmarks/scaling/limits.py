"""Limits of a fleet: the load on each part compared with its capacity, and what breaks first.

Every line is an estimate: a product of what one replica and one worker were measured to cost and
the periods in the server's own code. A worker's costs (reading an adapter, one receipt) are those
of its own code on its own records, in CPU seconds; its engine does nothing else meanwhile.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.scaling.registry_load import Cost, Measured
from safegene_server.registry.watch import POLL_S
from safegene_server.replica.heartbeat import BEAT_S
from safegene_server.tenants.settings import TenantSettings
from safegene_vllm.formats.adapter import Adapter, layer_of, load_adapter, save_adapter
from safegene_vllm.formats.family import FamilyHeader
from safegene_vllm.formats.profile import make_profile
from safegene_vllm.planner import ModelShape
from safegene_vllm.plugin.ops.gain_table import GainTable
from safegene_vllm.plugin.ops.step_state import StepState
from safegene_vllm.plugin.validation import Tenant
from safegene_vllm.plugin.worker_runtime import WorkerRuntime
from safegene_vllm.tiny_model import random_lora_weights

FOLLOW_S = 2.0
"""Replicas follow a change within this time."""
START_S = 600.0
"""A replica is ready within this time."""
STALL_S = 0.1
"""Longest acceptable pause of an engine."""


@dataclass(frozen=True)
class ReceiptCost:
    """Seconds of one receipt with `tenants` in the engine."""

    tenants: int
    receipt_s: float


@dataclass(frozen=True)
class AdapterRead:
    """One adapter read from the page cache and checked, as a worker does on a miss."""

    bytes: int
    seconds: float


@dataclass(frozen=True)
class Limit:
    """Load and capacity of one part in the same unit.

    `exhausted_at`: the number of replicas or tenants (`of`) at which the load reaches the capacity.
    """

    part: str
    load: float
    capacity: float
    unit: str
    exhausted_at: float | None
    of: str

    @property
    def used(self) -> float:
        return self.load / self.capacity


def extrapolate(measured: Sequence[Measured], tenants: int) -> Measured:
    """Extrapolate one database to `tenants` tenants from runs with fewer.

    What reads or writes a row per tenant lies on the line through the first and the last run.
    """
    few, many = measured[0], measured[-1]
    run = many.tenants - few.tenants
    more = (tenants - many.tenants) / run if run else tenants / many.tenants - 1

    def line(name: str) -> Cost:
        one, two = asdict(few.costs[name]), asdict(many.costs[name])
        base = one if run else dict.fromkeys(one, 0.0)
        return Cost(**{key: max(two[key] + more * (two[key] - base[key]), 0.0) for key in two})

    each = {name: line(name) for name in ("snapshot", "receipts_all")}
    return replace(many, tenants=tenants, costs={**many.costs, **each})


def follow(costs: Mapping[str, Cost]) -> Cost:
    """One replica's cost of a change: a snapshot, and a heartbeat with the new receipt.

    The heartbeat then reports a new version: one more audit row than the measured one.
    """
    one, two = asdict(costs["snapshot"]), asdict(costs["receipts_one"])
    extra = {"statements": 1, "writes": 1}
    return Cost(**{key: one[key] + two[key] + extra.get(key, 0) for key in one})


def limits(measured: Measured, replicas: int, changes_per_day: float) -> list[Limit]:
    """Limits of the registry's parts."""
    jobs, costs, change = TenantSettings(), measured.costs, follow(measured.costs)
    per_s = {"beat": 1 / BEAT_S, "poll": 1 / POLL_S, "claim": jobs.jobs_at_once / jobs.poll_s}
    changes_per_s = changes_per_day / 86400
    sqlite = measured.backend == "sqlite"
    name = "SQLite" if sqlite else "PostgreSQL"
    if sqlite:
        # One writer at a time; claims take the lock too. Disk time comes on top.
        burst_s = costs["receipts_one"].caller_cpu_s
        busy = sum(per_s[n] * costs[n].caller_cpu_s for n in ("beat", "claim"))
    else:
        burst_s = change.server_cpu_s
        busy = sum(each * costs[n].server_cpu_s for n, each in per_s.items())
    parts = [
        ("its one writer" if sqlite else "one core", busy + changes_per_s * burst_s, 1.0, ""),
        ("all replicas follow a change", burst_s, FOLLOW_S, "s"),
    ]
    if measured.connections and measured.connections_allowed:
        parts.append(("connections", measured.connections, measured.connections_allowed, ""))
    found = [
        Limit(f"{name}: {part}", each * replicas, has, unit, has / each or None, "replicas")
        for part, each, has, unit in parts
        if each
    ]
    follow_s = change.caller_cpu_s + change.server_cpu_s
    tenants = measured.tenants * FOLLOW_S / follow_s
    part = f"{name}: one replica follows"
    return [*found, Limit(part, follow_s, FOLLOW_S, "s", tenants, "tenants")]


def engine_limits(receipts: Sequence[ReceiptCost], tenants: int, load_s: float) -> list[Limit]:
    """Limits of one engine with `tenants`, by a line through the first and the last measurement.

    A starting replica loads its tenants one by one: it reads each adapter and reports it alone.
    """
    first, last = receipts[0], receipts[-1]
    slope = (last.receipt_s - first.receipt_s) / (last.tenants - first.tenants)
    base = max(last.receipt_s - slope * last.tenants, 0.0)
    most = (STALL_S - base) / slope if slope > 0 else None
    each = load_s + base + slope
    pause, start = "engine: pause for a receipt", "engine: start of a replica"
    return [
        Limit(pause, base + slope * tenants, STALL_S, "s", most, "tenants"),
        Limit(start, tenants * each, START_S, "s", START_S / each, "tenants"),
    ]


def read_adapter(work: Path, shape: ModelShape, rank: int) -> AdapterRead:
    """Write a random adapter on every target module of the model and read it five times."""
    shapes = {
        f"model.layers.{layer}.{linear.name}.{site}": (width, linear.d_in)
        for layer in range(shape.layers)
        for linear in shape.linears
        for site, width in zip(linear.sites, linear.widths, strict=True)
    }
    lora_weights = random_lora_weights(shapes, rank, 1)
    adapter = Adapter(lora_weights, None, {})
    save_adapter(adapter, work / "adapter", base_model=shape.name, dtype=torch.bfloat16)
    seconds = []
    for _ in range(5):
        started = time.process_time()
        load_adapter(work / "adapter")
        seconds.append(time.process_time() - started)
    size = sum(rank * sum(dims) * 2 for dims in shapes.values())
    return AdapterRead(size, statistics.median(seconds))


def measure_receipts(
    header: FamilyHeader, counts: tuple[int, ...], slots: int
) -> list[ReceiptCost]:
    """Time a worker's receipt with each of `counts` tenants, `slots` of them on the device.

    Runs the worker's code on its own records, without a model: a receipt reads nothing else.
    """
    runtime: Any = WorkerRuntime.__new__(WorkerRuntime)
    runtime.plan = SimpleNamespace(header=header, base_profile=None)
    runtime.settings = SimpleNamespace(apply="gain", missing_profile="refuse")
    runtime.family = SimpleNamespace(digest=header.digest, lora_weights=header.sites)
    runtime.vector = SimpleNamespace(bytes=0, notes=())
    runtime._load_s = 0.0
    runtime.step = StepState(GainTable(slots, header.num_layers, 64, "cpu"))
    runtime.manager = SimpleNamespace(lora_index_to_id=list(range(slots)), list_adapters=dict)
    runtime._adapter_bytes, runtime.evictions = {}, 0
    runtime._sites_by_layer = Counter(layer_of(site) for site in header.sites)
    runtime.tenants, found = {}, []
    for count in sorted(counts):
        for number in range(len(runtime.tenants), count):
            row = [0.5 + 0.001 * ((number + k) % 97) for k in range(header.num_layers)]
            name, place = f"tenant-{number:05d}@1", Path("/tenant")
            profile = make_profile(header, row, {"method": "scaling"})
            runtime.tenants[number] = Tenant(name, str(place), place, profile, 196, name, name)
        runtime.receipt(0, 1)
        seconds = []
        for _ in range(3):
            started = time.process_time()
            receipt = runtime.receipt(0, 1).to_dict()
            seconds.append(time.process_time() - started)
            assert len(receipt["adapters"]) == count
        found.append(ReceiptCost(count, statistics.median(seconds)))
    return found
