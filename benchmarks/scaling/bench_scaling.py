"""`make bench-scaling`: what tenants and replicas cost the registry, and tenants a worker.

The real registry under simulated replicas (SQLite, and PostgreSQL with --postgresql), a worker's
receipt, reading an adapter. Everything is measured. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
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
from benchmarks.scaling import registry_load, worker
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


def print_tables(result: dict[str, Any]) -> None:
    def show(title: str, heading: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        CONSOLE.print(table((heading, rows), title))

    registries = result["registries"]
    costs = [
        (
            m["backend"],
            str(m["tenants"]),
            *(
                f"{c['statements']:g}; {1e3 * c['seconds']:.1f} "
                f"({1e3 * c['caller_cpu_s']:.1f} + {1e3 * c['server_cpu_s']:.2f})"
                for c in m["costs"].values()
            ),
        )
        for m in registries
    ]
    title = "one replica: statements; ms per operation (CPU: caller + server)"
    show(title, ("database", "tenants", *registry_load.OPERATIONS), costs)
    fleets = [
        (m["backend"], str(m["tenants"]), *(f"{value:.4g}" for value in fleet.values()))
        for m in registries
        for fleet in m["fleets"]
    ]
    title = "replicas that follow one change at once"
    show(title, ("database", "tenants", *registries[0]["fleets"][0]), fleets)
    receipts = [(str(n), f"{1e3 * s:.1f} ms") for n, s in result["receipt_s"].items()]
    show("one worker", ("tenants", "a receipt"), receipts)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything."""
    shape = read_shape(options.model)
    header, counts = registry_load.header_of(shape), tuple(options.engine_tenants)
    with tempfile.TemporaryDirectory() as folder:
        read_s = worker.read_adapter_s(Path(folder), shape, RANK)
    return {
        "model": shape.name,
        "adapter_read_s": read_s,
        "receipt_s": worker.receipts_s(header, counts, SLOTS),
        "registries": [asdict(m) for m in measure_registries(options, shape)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    option = parser.add_argument
    option("--model", type=Path, default=ROOT / "benchmarks/scaling/qwen2.5-7b")
    option("--measure-tenants", type=int, nargs="+", default=[100, 1000])
    option("--together", type=int, nargs="+", default=[1, 4, 16], help="replicas run")
    option("--engine-tenants", type=int, nargs="+", default=[10, 100, 300, 1000])
    option("--postgresql", help="URL of a PostgreSQL server on this machine; databases are added")
    option("--short", action="store_true", help="small numbers, for CI")
    options = parser.parse_args()
    torch.set_num_threads(1)  # costs are CPU seconds of one core
    if options.short:
        options.measure_tenants, options.together = [5, 10], [1, 3]
        options.engine_tenants = [5, 10, 40]
    result = {**provenance(), "sqlalchemy": version("sqlalchemy"), **run(options)}
    print_tables(result)
    print_result("scaling", result)


if __name__ == "__main__":
    main()
