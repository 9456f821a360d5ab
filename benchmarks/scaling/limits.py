"""Limits of a fleet: the load on each part compared with its capacity, and what breaks first.

Every line is an estimate: a product of what one replica and one worker were measured to cost and
the periods in the server's own code. A worker's costs (reading an adapter, one receipt) are those
of its own code on its own records, in CPU seconds; its engine does nothing else meanwhile.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.scaling.registry_load import Cost, Measured
from safegene_server.registry.watch import POLL_S
from safegene_server.replica.heartbeat import BEAT_S
from safegene_server.tenants.settings import TenantSettings
from safegene_vllm.formats.adapter import Adapter, LoRAWeights, layer_of, load_adapter, save_adapter
from safegene_vllm.formats.family import FamilyHeader
from safegene_vllm.formats.profile import make_profile
from safegene_vllm.planner import ModelShape
from safegene_vllm.plugin.ops.gain_table import GainTable
from safegene_vllm.plugin.ops.step_state import StepState
from safegene_vllm.plugin.validation import Tenant
from safegene_vllm.plugin.worker_runtime import WorkerRuntime

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


def steady(measured: Measured) -> dict[str, float]:
    """Operations of one replica per second while nothing changes."""
    jobs = TenantSettings()
    return {"beat": 1 / BEAT_S, "poll": 1 / POLL_S, "claim": jobs.jobs_at_once / jobs.poll_s}


def grown(measured: Sequence[Measured], tenants: int) -> Measured:
    """Extrapolate one database to `tenants` tenants from runs with fewer.

    What reads or writes a row per tenant lies on the line through the first and the last run.
    """
    few, many = measured[0], measured[-1]

    def line(name: str) -> Cost:
        one, two = asdict(few.costs[name]), asdict(many.costs[name])
        run = many.tenants - few.tenants
        more = (tenants - many.tenants) / run if run else tenants / many.tenants - 1
        base = one if run else dict.fromkeys(one, 0.0)
        return Cost(**{key: max(two[key] + more * (two[key] - base[key]), 0.0) for key in two})

    every = {name: line(name) for name in ("snapshot", "receipts_all")}
    return replace(many, tenants=tenants, costs={**many.costs, **every})


def follow(costs: dict[str, Cost]) -> Cost:
    """One replica's cost of a change: a snapshot, and a heartbeat with the new receipt.

    The heartbeat then reports a new version: one more audit row than the measured one.
    """
    parts = [costs["snapshot"], costs["receipts_one"]]
    total = Cost(**{f.name: sum(getattr(p, f.name) for p in parts) for f in fields(Cost)})
    return replace(total, statements=total.statements + 1, writes=total.writes + 1)


def limits(measured: Measured, replicas: int, changes_per_day: float) -> list[Limit]:
    """Limits of the registry's parts."""
    rates, costs = steady(measured), measured.costs
    change, per_s = follow(costs), changes_per_day / 86400
    found = []
    if measured.backend == "sqlite":
        # One writer at a time; claims take the lock too. Disk time comes on top.
        burst = costs["receipts_one"].caller_cpu_s
        held = sum(rates[name] * costs[name].caller_cpu_s for name in ("beat", "claim"))
        held += per_s * burst
        found.append(_limit("SQLite: its one writer", held, replicas, 1.0, "of its time"))
        found.append(_limit("SQLite: all replicas follow a change", burst, replicas, FOLLOW_S, "s"))
    else:
        cpu = sum(rates[name] * costs[name].server_cpu_s for name in rates)
        cpu += per_s * change.server_cpu_s
        found.append(_limit("PostgreSQL: one core", cpu, replicas, 1.0, "of its time"))
        burst = change.server_cpu_s
        found.append(
            _limit("PostgreSQL: all replicas follow a change", burst, replicas, FOLLOW_S, "s")
        )
        if measured.connections and measured.connections_allowed:
            found.append(
                _limit(
                    "PostgreSQL: connections",
                    measured.connections,
                    replicas,
                    measured.connections_allowed,
                    "",
                )
            )
    follow_s = change.caller_cpu_s + change.server_cpu_s
    found.append(
        Limit(
            f"{_name(measured)}: one replica follows",
            follow_s,
            FOLLOW_S,
            "s",
            measured.tenants * FOLLOW_S / follow_s,
            "tenants",
        )
    )
    return found


def engine_limits(receipts: Sequence[ReceiptCost], tenants: int, load_s: float) -> list[Limit]:
    """Limits of one engine with `tenants`, by a line through the first and the last measurement.

    A starting replica loads its tenants one by one: it reads each adapter and reports it alone.
    """
    slope = (receipts[-1].receipt_s - receipts[0].receipt_s) / (
        receipts[-1].tenants - receipts[0].tenants
    )
    base = max(receipts[-1].receipt_s - slope * receipts[-1].tenants, 0.0)
    stall = base + slope * tenants
    each = load_s + base + slope
    most = (STALL_S - base) / slope if slope > 0 else None
    start = "engine: start of a replica"
    return [
        Limit("engine: pause for a receipt", stall, STALL_S, "s", most, "tenants"),
        Limit(start, tenants * each, START_S, "s", START_S / each, "tenants"),
    ]


def rows(measured: Measured, replicas: int, changes_per_day: float) -> dict[str, float]:
    """Rows in the registry: receipts, audit rows per change and per day."""
    counts = sorted(measured.audit_per_change)
    few, many = counts[0], counts[-1]
    each = measured.audit_per_change[many] - measured.audit_per_change[few]
    each /= max(many - few, 1)
    once = measured.audit_per_change[few] - each * few
    per_change = once + each * replicas
    return {
        "receipt_rows": float(replicas * measured.tenants),
        "audit_rows_per_change": per_change,
        "audit_rows_per_day": per_change * changes_per_day,
    }


def _name(measured: Measured) -> str:
    return "SQLite" if measured.backend == "sqlite" else "PostgreSQL"


def _limit(part: str, each: float, replicas: int, has: float, unit: str) -> Limit:
    return Limit(part, each * replicas, has, unit, has / each if each else None, "replicas")


def read_adapter(work: Path, shape: ModelShape, rank: int) -> AdapterRead:
    """Write a random adapter on every target module of the model and read it five times."""
    make = torch.Generator().manual_seed(1)

    def lora(d_out: int, d_in: int) -> LoRAWeights:
        halves = (torch.randn(n, generator=make).bfloat16() for n in (rank * d_in, d_out * rank))
        a, b = halves
        return LoRAWeights(a.view(rank, d_in), b.view(d_out, rank))

    lora_weights = {
        f"model.layers.{layer}.{linear.name}.{site}": lora(width, linear.d_in)
        for layer in range(shape.layers)
        for linear in shape.linears
        for site, width in zip(linear.sites, linear.widths, strict=True)
    }
    save_adapter(Adapter(lora_weights, None, {}), work / "adapter", base_model=shape.name)
    seconds = []
    for _ in range(5):
        started = time.process_time()
        load_adapter(work / "adapter")
        seconds.append(time.process_time() - started)
    size = sum(p.a.nbytes + p.b.nbytes for p in lora_weights.values())
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
