"""`make bench-scaling`: a thousand tenants on one GPU and a hundred replicas, by model and count.

A roofline per mode, a simulation of slots under Zipf-popular tenants, the real registry under
simulated replicas, and a worker's receipt of many tenants. Predictions stand next to what was
measured. What was measured is kept below --out. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), *(str(ROOT / p) for p in ("server", "benchmarks", "benchmarks/scaling"))]

import engine
import fleet
import plots
import registry
import traffic
from postgres import postgres
from provenance import commit
from safegene_vllm.planner import ModelShape, Workload, find_gpu, plan_modes, read_shape
from safegene_vllm.planner.slots import slot_bytes
from safegene_vllm.report.figure import save

EAGER_LAUNCH_S = 5e-6
"""What the host takes to start one copy or clearing of a slot's tensor; not measured."""
BATCHES = (1, 2, 4, 8, 16, 32, 64)
SLOTS = (8, 16, 32, 64, 128)
HOST = (64, 128, 256, 512, 1024)
RATES = (4.0, 8.0, 16.0)


def step_lines(ask: Workload) -> dict[str, list[tuple[float, float]]]:
    """Milliseconds of a step of 64 sequences by distinct tenants in it, per mode."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for tenants in BATCHES:
        now = replace(ask, tenants=64, concurrency=64, active=tenants, slots=64)
        modes = plan_modes(now)
        plain = plan_modes(replace(now, kernels="torch"))
        for name, mode in (
            ("gain table", modes["gain"]),
            ("composed slots", modes["composed"]),
            ("gain table, plain torch", plain["gain"]),
            ("multi-LoRA without safety", modes["stock"]),
        ):
            lines.setdefault(name, []).append((tenants, mode.step.seconds * 1e3))
    return lines


def slot_load_s(ask: Workload) -> float:
    """An adapter from host memory into a slot: its bytes over the link, and per part of every layer
    two clearings and two copies.
    """
    parts = sum(len(linear.widths) for linear in ask.shape.linears) * ask.shape.layers
    size = slot_bytes(ask.shape, ask.own_targets, ask.adapter_rank, ask.dtype_bytes)
    return size / ask.gpu.link_bytes_per_s + 4 * parts * EAGER_LAUNCH_S


def simulate(
    ask: Workload, load_s: float, seconds: float, track: Callable[[], Any]
) -> list[dict[str, Any]]:
    """Slots by rate with every adapter in host memory, then host memory at 64 slots."""
    found = []
    cases = [(rate, slots, ask.tenants) for rate in RATES for slots in SLOTS]
    cases += [(rate, 64, host) for rate in RATES for host in HOST]
    best: dict[float, traffic.Outcome] = {}
    for rate, slots, host in cases:
        load = traffic.Traffic(
            ask.tenants, 1.0, rate, seconds, ask.prompt_tokens, ask.output_tokens
        )
        mine = traffic.engine_of(
            replace(ask, slots=slots),
            host_adapters=host,
            slot_load_s=slot_load_s(ask),
            disk_load_s=load_s,
        )
        if rate not in best:
            best[rate] = traffic.simulate(traffic.without_reloads(mine, ask.tenants), load)
        outcome = traffic.simulate(mine, load)
        found.append(
            {
                "requests_per_s": rate,
                "slots": slots,
                "host_adapters": host,
                **asdict(outcome),
                "added_ttft_p50_s": outcome.ttft_p50_s - best[rate].ttft_p50_s,
                "added_ttft_p99_s": outcome.ttft_p99_s - best[rate].ttft_p99_s,
            }
        )
        track()
    return found


def kept(arguments: argparse.Namespace, name: str, make: Callable[[], Any]) -> Any:
    """The JSON value of this name, made and written if this commit has not; or if --fresh."""
    path = arguments.out / commit() / f"{name}.json"
    if arguments.fresh or not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(make(), indent=1) + "\n")
    return json.loads(path.read_text())


def listed(numbers: Iterable[int]) -> str:
    return "-".join(map(str, numbers))


def measure_registries(
    arguments: argparse.Namespace, shape: ModelShape, progress: Progress
) -> list[registry.Measured]:
    """SQLite, and PostgreSQL where its binaries are, with each number of tenants."""
    found = []
    with postgres() as server, tempfile.TemporaryDirectory() as folder:
        for tenants in arguments.measure_tenants:
            for name in ("sqlite", "postgresql"):
                if name == "postgresql" and server is None:
                    continue
                task = progress.add_task(f"{name}, {tenants} tenants", total=tenants)

                def make(name: str = name, tenants: int = tenants, task: Any = task) -> Any:
                    url, mine = f"sqlite:///{folder}/{tenants}.db", None
                    if name == "postgresql" and server is not None:
                        server.ask(f"CREATE DATABASE r{tenants}")
                        url, mine = server.url(f"r{tenants}"), server
                    return asdict(
                        registry.measure(
                            url,
                            shape,
                            tenants=tenants,
                            replicas=tuple(arguments.together),
                            server=mine,
                            track=lambda number: progress.update(task, completed=number + 1),
                        )
                    )

                key = f"registry-{name}-{tenants}-by-{listed(arguments.together)}"
                found.append(registry.measured_of(kept(arguments, key, make)))
                progress.remove_task(task)
    return found


def predictions(measured: list[registry.Measured], held: list[engine.Held]) -> list[dict[str, Any]]:
    """What one replica's costs, or fewer tenants, say of more; and what was then measured."""
    found = []

    def add(what: str, predicted: float, was: float, unit: str) -> None:
        found.append({"what": what, "predicted": predicted, "measured": was, "unit": unit})

    for m in measured:
        most, each = max(m.propagation_s), fleet.follow(m.costs)
        name = f"{m.backend}, {m.tenants} tenants, {most} replicas"
        add(f"statements of a change, {name}", most * each.statements,
            m.statements_per_change[most], "")  # fmt: skip
        add(f"audit rows of a change, {name}", 3 + 2 * most, m.audit_per_change[most], "")
        add(f"processors of a change, {name}",
            most * (each.caller_cpu_s + each.server_cpu_s), m.change_cpu_s[most], "s")  # fmt: skip
    by_tenants = {m.tenants: m for m in measured if m.backend == measured[0].backend}
    if len(by_tenants) > 1:
        few, many = min(by_tenants), max(by_tenants)
        before = by_tenants[few].costs["snapshot"].caller_cpu_s
        add(f"a snapshot of {many} tenants, in proportion to {few}", before * many / few,
            by_tenants[many].costs["snapshot"].caller_cpu_s, "s")  # fmt: skip
    if len(held) > 2:
        first, second, last = held[0], held[-2], held[-1]
        slope = (second.receipt_s - first.receipt_s) / (second.tenants - first.tenants)
        line = first.receipt_s + slope * (last.tenants - first.tenants)
        add(f"a receipt of {last.tenants} tenants, from {second.tenants}", line,
            last.receipt_s, "s")  # fmt: skip
    return found


def tell(console: Console, told: dict[str, Any]) -> None:
    """The tables for people."""
    table = Table(
        *("requests/s", "slots", "host", "slot hits", "reloads", "added TTFT p50", "p99", ""),
        title=f"{told['tenants']} tenants on one {told['gpu']}, by simulation",
    )
    for row in told["simulation"]:
        table.add_row(
            f"{row['requests_per_s']:g}",
            str(row["slots"]),
            str(row["host_adapters"]),
            f"{row['slot_hits']:.0%}",
            f"{row['reload_share']:.1%} of the time",
            f"{row['added_ttft_p50_s'] * 1e3:.1f} ms",
            f"{row['added_ttft_p99_s'] * 1e3:.1f} ms",
            "overloaded" if row["overloaded"] else "",
        )
    console.print(table)
    table = Table(
        "database",
        "tenants",
        *registry.OPERATIONS,
        title="ms per operation (processor: caller + server)",
    )
    for m in told["registries"]:
        costs = [m["costs"][name] for name in registry.OPERATIONS]
        cpu = m["backend"] == "postgresql"
        cells = [
            f"{c['seconds'] * 1e3:.1f} ({c['caller_cpu_s'] * 1e3:.1f}"
            + (f" + {c['server_cpu_s'] * 1e3:.2f})" if cpu else ")")
            for c in costs
        ]
        table.add_row(m["backend"], str(m["tenants"]), *cells)
    console.print(table)
    if told["engine"]:
        table = Table("tenants", "a receipt", title="one worker")
        for h in told["engine"]:
            table.add_row(str(h["tenants"]), f"{h['receipt_s'] * 1e3:.1f} ms")
        console.print(table)
    table = Table("what", "predicted", "measured")
    for p in told["predictions"]:
        table.add_row(
            p["what"], f"{p['predicted']:.4g} {p['unit']}", f"{p['measured']:.4g} {p['unit']}"
        )
    console.print(table)
    title = f"{told['replicas']} replicas, {told['tenants']} tenants"
    table = Table("part", "asked", "has", "used", "used up at", title=title)
    for limit in told["limits"]:
        first = "-" if limit["first_at"] is None else f"{limit['first_at']:,.0f} {limit['of']}"
        table.add_row(
            limit["part"],
            f"{limit['asked']:.3g} {limit['unit']}",
            f"{limit['has']:g} {limit['unit']}",
            f"{limit['asked'] / limit['has']:.2f}",
            first,
        )
    console.print(table)


def draw(out: Path, ask: Workload, told: dict[str, Any], limits: list[fleet.Limit]) -> None:
    """step, slots, host and limits, each as .svg and .png."""
    simulated = told["simulation"]
    half = len(RATES) * len(SLOTS)
    by_slots: dict[str, list[tuple[float, float]]] = {}
    by_host: dict[str, list[tuple[float, float]]] = {}
    for lines, key, part in (
        (by_slots, "slots", simulated[:half]),
        (by_host, "host_adapters", simulated[half:]),
    ):
        for row in part:
            added = max(row["added_ttft_p99_s"] * 1e3, 0.1)
            lines.setdefault(f"{row['requests_per_s']:g} requests/s", []).append((row[key], added))
    late = "ms added to the first token, p99"
    figures = {
        "step": plots.draw_lines(
            step_lines(ask), "distinct tenants in a batch of 64", "ms per step"
        ),
        "slots": plots.draw_lines(by_slots, "LoRA slots", late, log=True),
        "host": plots.draw_lines(by_host, "adapters in host memory", late, log=True),
        "limits": plots.draw_limits(limits),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        for ending in ("svg", "png"):
            save(figure, out / f"{name}.{ending}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "benchmarks/scaling/qwen2.5-7b")
    parser.add_argument("--gpu", default="h100-sxm")
    parser.add_argument("--tenants", type=int, default=1000)
    parser.add_argument("--replicas", type=int, default=100)
    parser.add_argument("--changes-per-day", type=float, default=1000.0)
    parser.add_argument("--seconds", type=float, default=300.0, help="simulated seconds")
    parser.add_argument("--measure-tenants", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--together", type=int, nargs="+", default=[1, 4, 16], help="replicas run")
    parser.add_argument("--engine-tenants", type=int, nargs="+", default=[10, 100, 300, 1000])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "scaling")
    parser.add_argument("--fresh", action="store_true", help="measure again what --out has")
    parser.add_argument("--short", action="store_true", help="small numbers, for CI")
    arguments = parser.parse_args()
    # What was started is stopped again, whoever ends us.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if arguments.short:
        arguments.measure_tenants, arguments.together = [5, 10], [1, 3]
        arguments.seconds, arguments.engine_tenants = 20.0, [5, 10, 40]
    shape = read_shape(arguments.model)
    ask = Workload(shape, find_gpu(arguments.gpu), tenants=arguments.tenants, concurrency=128)
    with Progress(transient=True) as progress, tempfile.TemporaryDirectory() as folder:
        task = progress.add_task("reading an adapter", total=None)
        read = engine.Read(
            **kept(
                arguments,
                f"adapter-{shape.name}",
                lambda: asdict(engine.read_adapter(Path(folder), shape, ask.adapter_rank)),
            )
        )
        progress.remove_task(task)
        measured = measure_registries(arguments, shape, progress)
        counts = tuple(arguments.engine_tenants)
        task = progress.add_task("receipts", total=None)
        receipts = kept(
            arguments,
            f"receipts-{shape.name}-{listed(counts)}",
            lambda: [asdict(h) for h in engine.measure(registry.header_of(shape), counts, 32)],
        )
        progress.remove_task(task)
        held = [engine.Held(**raw) for raw in receipts]
        cases = len(RATES) * (len(SLOTS) + len(HOST))
        task = progress.add_task("simulating", total=cases)
        simulated = simulate(ask, read.seconds, arguments.seconds, lambda: progress.advance(task))
    limits: list[fleet.Limit] = []
    for name in dict.fromkeys(m.backend for m in measured):
        own = [m for m in measured if m.backend == name]
        whole = fleet.grown(own, arguments.tenants)
        limits += fleet.limits(whole, arguments.replicas, arguments.changes_per_day)
    if len(held) > 1:
        limits += fleet.engine_limits(held, arguments.tenants, read.seconds)
    limits.sort(key=lambda limit: -limit.used)
    told: dict[str, Any] = {
        "model": shape.name,
        "gpu": ask.gpu.name,
        "tenants": arguments.tenants,
        "replicas": arguments.replicas,
        "adapter_read": asdict(read),
        "slot_load_s": slot_load_s(ask),
        "step_ms": step_lines(ask),
        "simulation": simulated,
        "registries": [asdict(m) for m in measured],
        "engine": [asdict(h) for h in held],
        "predictions": predictions(measured, held),
        "limits": [asdict(limit) for limit in limits],
        "rows": fleet.rows(whole, arguments.replicas, arguments.changes_per_day),
    }
    draw(arguments.out, ask, told, limits)
    tell(Console(), told)
    head = {
        "benchmark": "scaling",
        "commit": commit(),
        "sqlalchemy": version("sqlalchemy"),
        "device": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
    }
    line = json.dumps({**head, **told})
    (arguments.out / "scaling.json").write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
