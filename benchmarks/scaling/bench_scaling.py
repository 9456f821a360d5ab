"""`make bench-scaling`: limits of a thousand tenants and a hundred replicas.

Measured: the real registry under simulated replicas (SQLite, and PostgreSQL with --postgresql), a
worker's receipt, reading an adapter. Estimated by multiplication: the limits of a fleet, printed
next to a measurement where there is one. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from benchmarks.results import CONSOLE, ROOT, print_result, provenance, table
from benchmarks.scaling import limits, registry_load
from benchmarks.scaling.registry_load import Measured, Postgres
from safegene_vllm.planner import ModelShape, read_shape

RANK, SLOTS = 16, 32


def measure_registries(options: argparse.Namespace, shape: ModelShape) -> list[Measured]:
    """Every database with every number of tenants."""
    server = Postgres(options.postgresql) if options.postgresql else None
    found = []
    with tempfile.TemporaryDirectory() as folder, Progress(console=CONSOLE) as progress:
        for database in (None, server) if server else (None,):
            for tenants in options.measure_tenants:
                name = f"safegene_scaling_{tenants}"
                url = database.create(name) if database else f"sqlite:///{folder}/{name}.db"
                task = progress.add_task(f"{tenants} tenants", total=tenants)
                measured = registry_load.measure(
                    url,
                    shape,
                    tenants=tenants,
                    replicas=tuple(options.together),
                    server=database,
                    progress=partial(progress.advance, task),
                )
                found.append(measured)
    return found


def compare(
    measured: Sequence[Measured], receipts: Sequence[limits.ReceiptCost]
) -> list[tuple[str, float, float]]:
    """(what, estimate from one replica or from fewer tenants, measurement)."""
    found: list[tuple[str, float, float]] = []
    for m in measured:
        fleet, each = m.fleets[-1], limits.follow(m.costs)
        n, name = fleet.replicas, f"of a change, {m.backend}, {m.tenants} tenants"
        cpu_s = n * (each.caller_cpu_s + each.server_cpu_s)
        found += [
            (f"statements {name}, {n} replicas", n * each.statements, fleet.statements),
            (f"audit rows {name}, {n} replicas", 3 + 2 * n, fleet.audit_rows),
            (f"CPU seconds {name}, {n} replicas", cpu_s, fleet.cpu_s),
        ]
    if len(receipts) > 2:
        first, middle, last = receipts[0], receipts[-2], receipts[-1]
        slope = (middle.receipt_s - first.receipt_s) / (middle.tenants - first.tenants)
        line_s = first.receipt_s + slope * (last.tenants - first.tenants)
        found.append((f"seconds of a receipt of {last.tenants} tenants", line_s, last.receipt_s))
    return found


def print_tables(result: dict[str, Any]) -> None:
    def show(title: str, heading: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        CONSOLE.print(table((heading, rows), title))

    operations = registry_load.OPERATIONS
    costs = [
        (
            m["backend"],
            str(m["tenants"]),
            *(
                f"{c['statements']:g}; {1e3 * c['seconds']:.1f} "
                f"({1e3 * c['caller_cpu_s']:.1f} + {1e3 * c['server_cpu_s']:.2f})"
                for c in (m["costs"][name] for name in operations)
            ),
        )
        for m in result["registries"]
    ]
    title = "measured: statements; ms per operation (CPU: caller + server)"
    show(title, ("database", "tenants", *operations), costs)
    receipts = [(str(r["tenants"]), f"{r['receipt_s'] * 1e3:.1f} ms") for r in result["engine"]]
    show("measured: one worker", ("tenants", "a receipt"), receipts)
    compared = [(what, f"{e:.4g}", f"{m:.4g}") for what, e, m in result["predictions"]]
    show("estimates next to measurements", ("what", "estimated", "measured"), compared)
    shares = [
        (
            limit["part"],
            f"{limit['load']:.3g} {limit['unit']}",
            f"{limit['capacity']:g} {limit['unit']}",
            f"{limit['load'] / limit['capacity']:.2f}",
            f"{limit['exhausted_at'] or float('inf'):,.0f} {limit['of']}",
        )
        for limit in result["limits"]
    ]
    title = f"estimates: {result['replicas']} replicas, {result['tenants']} tenants"
    show(title, ("part", "load", "capacity", "used", "exhausted at"), shares)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, then estimate."""
    shape = read_shape(options.model)
    with tempfile.TemporaryDirectory() as folder:
        read = limits.read_adapter(Path(folder), shape, RANK)
    header, counts = registry_load.header_of(shape), tuple(options.engine_tenants)
    receipts = limits.measure_receipts(header, counts, SLOTS)
    measured = measure_registries(options, shape)
    found: list[limits.Limit] = []
    if len(receipts) > 1:
        found += limits.engine_limits(receipts, options.tenants, read.seconds)
    for backend in dict.fromkeys(m.backend for m in measured):
        own = [m for m in measured if m.backend == backend]
        fleet = limits.extrapolate(own, options.tenants)
        found += limits.limits(fleet, options.replicas, options.changes_per_day)
    return {
        "model": shape.name,
        "tenants": options.tenants,
        "replicas": options.replicas,
        "estimates": ["limits"],
        "adapter_read": asdict(read),
        "registries": [asdict(m) for m in measured],
        "engine": [asdict(cost) for cost in receipts],
        "predictions": compare(measured, receipts),
        "limits": [asdict(limit) for limit in sorted(found, key=lambda limit: -limit.used)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    option = parser.add_argument
    option("--model", type=Path, default=ROOT / "benchmarks/scaling/qwen2.5-7b")
    option("--tenants", type=int, default=1000)
    option("--replicas", type=int, default=100)
    option("--changes-per-day", type=float, default=1000.0)
    option("--measure-tenants", type=int, nargs="+", default=[100, 1000])
    option("--together", type=int, nargs="+", default=[1, 4, 16], help="replicas run")
    option("--engine-tenants", type=int, nargs="+", default=[10, 100, 300, 1000])
    option("--postgresql", help="URL of a PostgreSQL server on this machine; databases are added")
    option("--out", type=Path, default=ROOT / "build" / "scaling")
    option("--short", action="store_true", help="small numbers, for CI")
    options = parser.parse_args()
    torch.set_num_threads(1)  # costs are CPU seconds of one core
    if options.short:
        options.measure_tenants, options.together = [5, 10], [1, 3]
        options.engine_tenants = [5, 10, 40]
    result = {**provenance(), "sqlalchemy": version("sqlalchemy"), **run(options)}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "scaling.json").write_text(json.dumps(result) + "\n")
    print_tables(result)
    print_result("scaling", result)


if __name__ == "__main__":
    main()
