"""`make bench-scaling`: a thousand tenants on one GPU and a hundred replicas, by model and count.

Measured: the real registry under simulated replicas, a worker's receipt, reading an adapter. Those
are cached below --out by commit. Estimated: step times by the planner's roofline, LoRA slots by a
simulation, and the limits of a fleet by multiplication; each says so in the output, and is printed
next to a measurement where there is one. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from benchmarks.plots import draw_lines, draw_shares
from benchmarks.results import CONSOLE, ROOT, cached, commit, print_result, provenance, table
from benchmarks.scaling import engine_simulation, limits, registry_load
from safegene_vllm.planner import Workload, find_gpu, plan_modes, read_shape
from safegene_vllm.planner.slots import slot_bytes
from safegene_vllm.report.figure import save

EAGER_LAUNCH_S = 5e-6
"""Host time to start one copy or clearing of a slot's tensor; assumed."""
BATCHES = (1, 2, 4, 8, 16, 32, 64)
SLOTS = (8, 16, 32, 64, 128)
HOST = (64, 128, 256, 512, 1024)
RATES = (4.0, 8.0, 16.0)
Lines = dict[str, list[tuple[float, float]]]


def step_lines(workload: Workload) -> Lines:
    """Estimated milliseconds of a step of 64 sequences by distinct tenants in it, per mode."""
    lines: Lines = {}
    for tenants in BATCHES:
        batch = replace(workload, tenants=64, concurrency=64, active=tenants, slots=64)
        modes = plan_modes(batch)
        for name, mode in (
            ("gain table", modes["gain"]),
            ("composed slots", modes["composed"]),
            ("gain table, plain torch", plan_modes(replace(batch, kernels="torch"))["gain"]),
            ("multi-LoRA without safety", modes["stock"]),
        ):
            lines.setdefault(name, []).append((tenants, mode.step.seconds * 1e3))
    return lines


def slot_load_s(workload: Workload) -> float:
    """Estimated time of an adapter from host memory into a slot.

    Its bytes over the link, and two clearings and two copies per part of every layer.
    """
    shape = workload.shape
    parts = sum(len(linear.widths) for linear in shape.linears) * shape.layers
    size = slot_bytes(shape, workload.own_targets, workload.adapter_rank, workload.dtype_bytes)
    return size / workload.gpu.link_bytes_per_s + 4 * parts * EAGER_LAUNCH_S


def simulate(
    workload: Workload, disk_load_s: float, seconds: float, on_case: Callable[[], Any]
) -> list[dict[str, Any]]:
    """Slots by rate with every adapter in host memory, then host memory at 64 slots."""
    cases = [(rate, slots, workload.tenants) for rate in RATES for slots in SLOTS]
    cases += [(rate, 64, host) for rate in RATES for host in HOST]
    found, baseline = [], dict[float, engine_simulation.Outcome]()
    for rate, slots, host in cases:
        traffic = engine_simulation.Traffic(
            workload.tenants, 1.0, rate, seconds, workload.prompt_tokens, workload.output_tokens
        )
        engine = engine_simulation.engine_of(
            replace(workload, slots=slots),
            host_adapters=host,
            slot_load_s=slot_load_s(workload),
            disk_load_s=disk_load_s,
        )
        if rate not in baseline:
            ideal = engine_simulation.without_reloads(engine, workload.tenants)
            baseline[rate] = engine_simulation.simulate(ideal, traffic)
        outcome = engine_simulation.simulate(engine, traffic)
        added_p50_s = outcome.ttft_p50_s - baseline[rate].ttft_p50_s
        added_p99_s = outcome.ttft_p99_s - baseline[rate].ttft_p99_s
        case = {"requests_per_s": rate, "slots": slots, "host_adapters": host}
        added = {"added_ttft_p50_s": added_p50_s, "added_ttft_p99_s": added_p99_s}
        found.append(case | asdict(outcome) | added)
        on_case()
    return found


def measure_registries(
    options: argparse.Namespace, cache: Callable[..., Any], progress: Progress
) -> list[registry_load.Measured]:
    """SQLite, and PostgreSQL if its binaries exist, with each number of tenants."""
    found = []
    with ExitStack() as stack:
        server = stack.enter_context(registry_load.postgres())
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        for tenants in options.measure_tenants:
            for backend in ("sqlite", "postgresql") if server else ("sqlite",):
                postgres = server if backend == "postgresql" else None
                task = progress.add_task(f"{backend}, {tenants} tenants", total=tenants)

                def make(tenants: int = tenants, postgres: Any = postgres, task: Any = task) -> Any:
                    url = f"sqlite:///{folder}/{tenants}.db"
                    if postgres is not None:
                        postgres.query(f"CREATE DATABASE r{tenants}")
                        url = postgres.url(f"r{tenants}")
                    measured = registry_load.measure(
                        url,
                        read_shape(options.model),
                        tenants=tenants,
                        replicas=tuple(options.together),
                        server=postgres,
                        track=lambda number: progress.update(task, completed=number + 1),
                    )
                    return asdict(measured)

                together = "-".join(map(str, options.together))
                name = f"registry-{backend}-{tenants}-by-{together}"
                found.append(registry_load.measured_of(cache(name, make)))
                progress.remove_task(task)
    return found


def compare(
    measured: list[registry_load.Measured], receipts: list[limits.ReceiptCost]
) -> list[dict[str, Any]]:
    """Estimates from one replica, or from fewer tenants, next to what was then measured."""
    found = []

    def add(what: str, predicted: float, measured: float, unit: str) -> None:
        found.append({"what": what, "predicted": predicted, "measured": measured, "unit": unit})

    for m in measured:
        replicas, each = max(m.propagation_s), limits.follow(m.costs)
        cpu_s = each.caller_cpu_s + each.server_cpu_s
        name = f"of a change, {m.backend}, {m.tenants} tenants, {replicas} replicas"
        statements = m.statements_per_change[replicas]
        add(f"statements {name}", replicas * each.statements, statements, "")
        add(f"audit rows {name}", 3 + 2 * replicas, m.audit_per_change[replicas], "")
        add(f"CPU time {name}", replicas * cpu_s, m.change_cpu_s[replicas], "s")
    runs = sorted((m.tenants, m) for m in measured if m.backend == measured[0].backend)
    if len(runs) > 1:
        (few, first), (many, last) = runs[0], runs[-1]
        before, after = (m.costs["snapshot"].caller_cpu_s for m in (first, last))
        add(f"a snapshot of {many} tenants, from {few}", before * many / few, after, "s")
    if len(receipts) > 2:
        start, middle, end = receipts[0], receipts[-2], receipts[-1]
        slope = (middle.receipt_s - start.receipt_s) / (middle.tenants - start.tenants)
        line = start.receipt_s + slope * (end.tenants - start.tenants)
        what = f"a receipt of {end.tenants} tenants, from {middle.tenants}"
        add(what, line, end.receipt_s, "s")
    return found


def print_tables(result: dict[str, Any]) -> None:
    def show(title: str, heading: tuple[str, ...], rows: Sequence[Sequence[str]]) -> None:
        CONSOLE.print(table((heading, rows), title))

    show(
        f"{result['tenants']} tenants on one {result['gpu']}: simulated estimates, not measured",
        ("requests/s", "slots", "host", "slot hits", "reloads", "added TTFT p50", "p99", ""),
        [
            (
                f"{row['requests_per_s']:g}",
                str(row["slots"]),
                str(row["host_adapters"]),
                f"{row['slot_hits']:.0%}",
                f"{row['reload_share']:.1%} of the time",
                f"{row['added_ttft_p50_s'] * 1e3:.1f} ms",
                f"{row['added_ttft_p99_s'] * 1e3:.1f} ms",
                "overloaded" if row["overloaded"] else "",
            )
            for row in result["simulation"]
        ],
    )
    show(
        "measured: ms per operation (CPU: caller + server)",
        ("database", "tenants", *registry_load.OPERATIONS),
        [
            (
                m["backend"],
                str(m["tenants"]),
                *(
                    f"{1e3 * c['seconds']:.1f} ({1e3 * c['caller_cpu_s']:.1f} + "
                    f"{1e3 * c['server_cpu_s']:.2f})"
                    for c in (m["costs"][name] for name in registry_load.OPERATIONS)
                ),
            )
            for m in result["registries"]
        ],
    )
    receipts = [(str(r["tenants"]), f"{r['receipt_s'] * 1e3:.1f} ms") for r in result["engine"]]
    show("measured: one worker", ("tenants", "a receipt"), receipts)
    show(
        "estimates next to measurements",
        ("what", "estimated", "measured"),
        [
            (p["what"], *(f"{p[key]:.4g} {p['unit']}" for key in ("predicted", "measured")))
            for p in result["predictions"]
        ],
    )
    show(
        f"estimates: {result['replicas']} replicas, {result['tenants']} tenants",
        ("part", "load", "capacity", "used", "exhausted at"),
        [
            (
                limit["part"],
                f"{limit['load']:.3g} {limit['unit']}",
                f"{limit['capacity']:g} {limit['unit']}",
                f"{limit['load'] / limit['capacity']:.2f}",
                f"{limit['exhausted_at'] or float('inf'):,.0f} {limit['of']}",
            )
            for limit in result["limits"]
        ],
    )


def write_plots(out: Path, result: dict[str, Any]) -> None:
    """Write step, slots, host and limits as SVG."""
    late = "ms added to the first token, p99 (simulated)"

    def lines(key: str, rows: list[dict[str, Any]]) -> Lines:
        found: Lines = {}
        for row in rows:
            point = (row[key], max(row["added_ttft_p99_s"] * 1e3, 0.1))
            found.setdefault(f"{row['requests_per_s']:g} requests/s", []).append(point)
        return found

    half = len(RATES) * len(SLOTS)
    by_slots = lines("slots", result["simulation"][:half])
    by_host = lines("host_adapters", result["simulation"][half:])
    batch, shares = "distinct tenants in a batch of 64", {}
    for limit in result["limits"]:
        shares[limit["part"]] = limit["load"] / limit["capacity"]
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in {
        "step": draw_lines(result["step_ms"], batch, "ms per step (roofline)"),
        "slots": draw_lines(by_slots, "LoRA slots", late, log=True),
        "host": draw_lines(by_host, "adapters in host memory", late, log=True),
        "limits": draw_shares(shares, "load as a multiple of the capacity (estimated)"),
    }.items():
        save(figure, out / f"{name}.svg")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what is not cached, then estimate."""
    shape = read_shape(options.model)
    workload = Workload(shape, find_gpu(options.gpu), tenants=options.tenants, concurrency=128)

    def cache(name: str, make: Callable[[], Any]) -> Any:
        return cached(options.out / commit() / f"{name}.json", make, fresh=options.fresh)

    def read_adapter() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            return asdict(limits.read_adapter(Path(folder), shape, workload.adapter_rank))

    def measure_receipts() -> list[dict[str, Any]]:
        header, counts = registry_load.header_of(shape), tuple(options.engine_tenants)
        return [asdict(cost) for cost in limits.measure_receipts(header, counts, 32)]

    with Progress(console=CONSOLE, transient=True) as progress:
        read = limits.AdapterRead(**cache(f"adapter-{shape.name}", read_adapter))
        measured = measure_registries(options, cache, progress)
        counts = "-".join(map(str, options.engine_tenants))
        raw = cache(f"receipts-{shape.name}-{counts}", measure_receipts)
        receipts = [limits.ReceiptCost(**cost) for cost in raw]
        task = progress.add_task("simulating", total=len(RATES) * (len(SLOTS) + len(HOST)))
        simulated = simulate(
            workload, read.seconds, options.seconds, lambda: progress.advance(task)
        )
    found: list[limits.Limit] = []
    for backend in dict.fromkeys(m.backend for m in measured):
        own = [m for m in measured if m.backend == backend]
        fleet = limits.grown(own, options.tenants)
        found += limits.limits(fleet, options.replicas, options.changes_per_day)
    if len(receipts) > 1:
        found += limits.engine_limits(receipts, options.tenants, read.seconds)
    return {
        "model": shape.name,
        "gpu": workload.gpu.name,
        "tenants": options.tenants,
        "replicas": options.replicas,
        "estimates": ["slot_load_s", "step_ms", "simulation", "limits", "rows"],
        "adapter_read": asdict(read),
        "slot_load_s": slot_load_s(workload),
        "step_ms": step_lines(workload),
        "simulation": simulated,
        "registries": [asdict(m) for m in measured],
        "engine": [asdict(cost) for cost in receipts],
        "predictions": compare(measured, receipts),
        "limits": [asdict(limit) for limit in sorted(found, key=lambda limit: -limit.used)],
        "rows": limits.rows(fleet, options.replicas, options.changes_per_day),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    option = parser.add_argument
    option("--model", type=Path, default=ROOT / "benchmarks/scaling/qwen2.5-7b")
    option("--gpu", default="h100-sxm")
    option("--tenants", type=int, default=1000)
    option("--replicas", type=int, default=100)
    option("--changes-per-day", type=float, default=1000.0)
    option("--seconds", type=float, default=300.0, help="simulated seconds")
    option("--measure-tenants", type=int, nargs="+", default=[100, 1000])
    option("--together", type=int, nargs="+", default=[1, 4, 16], help="replicas run")
    option("--engine-tenants", type=int, nargs="+", default=[10, 100, 300, 1000])
    option("--out", type=Path, default=ROOT / "build" / "scaling")
    option("--fresh", action="store_true", help="measure again what is cached in --out")
    option("--short", action="store_true", help="small numbers, for CI")
    options = parser.parse_args()
    torch.set_num_threads(1)  # costs are CPU seconds of one core
    # An exit runs every `finally`: PostgreSQL is stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if options.short:
        options.measure_tenants, options.together = [5, 10], [1, 3]
        options.seconds, options.engine_tenants = 20.0, [5, 10, 40]
    result = run(options)
    write_plots(options.out, result)
    print_tables(result)
    result = {**provenance(), "sqlalchemy": version("sqlalchemy"), **result}
    (options.out / "scaling.json").write_text(json.dumps(result) + "\n")
    print_result("scaling", result)


if __name__ == "__main__":
    main()
