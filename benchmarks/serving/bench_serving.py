"""`make bench-serving`: cost of safety in a real server, compared with every other way to add it.

One server per arm, under load over HTTP by vLLM's own `bench serve` in interleaved rounds; one axis
at a time is varied. Complete rounds below build/serving are reused. Prints tables, writes a page,
and ends in one JSON line.
"""

from __future__ import annotations

import argparse
import os
import signal
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from benchmarks.results import CONSOLE, ROOT, on_cpu, print_result, provenance
from benchmarks.serving import report
from benchmarks.serving.arms import baseline, parse_arm
from benchmarks.serving.artifacts import write_tiny_model
from benchmarks.serving.cells import GROUPS, Axes, Cell, Load, make_cells
from benchmarks.serving.measure import SETTLE_S, Bench, ResultCache, measure
from examples.smollm2.base_model import write_base
from safegene_vllm.errors import SafegeneError

SHORT = {
    **{"tenants": (2,), "profiles": (2, 1), "rank": (8,), "mode": ("eager",)},
    **{"prompt_tokens": (32,), "output_tokens": (8,), "concurrency": (4,)},
    "cells": ("main", "paired"),
    "arms": ("gain_100", "aside_100", "composed_100", "guard", "system_prompt"),
    **{"requests": 24, "rounds": 2, "starts": 1},
}
"""Defaults of --short."""
SPARE_TOKENS = 128
"""Context besides prompt, output, guard and system prompt."""
VECTOR_RANK = 8


def _flag(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name or name.startswith("-"):
        raise argparse.ArgumentTypeError(f"{text!r} is not FLAG=VALUE, FLAG without dashes")
    return name, value


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    option = parser.add_argument
    option("--short", action="store_true", help="tiny model, few arms, two rounds")
    option("--model", type=Path, help="checkpoint (default: SmolLM2-135M-Instruct)")
    option("--cells", nargs="+", choices=GROUPS, default=GROUPS, help="default: all")
    option("--arms", nargs="+", help="only these arms and their baselines")
    option("--rounds", type=int, default=5)
    option("--requests", type=int, default=32, help="requests per run of an arm")
    option("--starts", type=int, default=5, help="starts where loading is compared")
    for name, default in asdict(Axes()).items():
        values: dict[str, Any] = {"type": int}
        if name == "mode":
            values = {"choices": ("eager", "compiled")}
        flag, text = f"--{name.replace('_', '-')}", "the first is the center"
        option(flag, nargs="+", default=default, help=text, **values)
    threads = max(1, len(os.sched_getaffinity(0)) - 1)
    option("--threads", type=int, default=threads, help="per engine on CPU (default: cores - 1)")
    text = "more vLLM flags for every arm, such as gpu-memory-utilization=0.1"
    option("--engine", nargs="+", type=_flag, default=(), metavar="FLAG=VALUE", help=text)
    option("--build", type=Path, default=ROOT / "build" / "serving")
    option("--fresh", action="store_true", help="measure these cells again")
    option("--publish", action="store_true", help="write docs/performance.md too")
    if parser.parse_args(arguments).short:
        parser.set_defaults(**SHORT)
    return parser.parse_args(arguments)


def cells_of(arguments: argparse.Namespace, *, cpu: bool) -> list[Cell]:
    """The cells to measure. Raises: ConfigError."""
    axes = Axes(**{name: getattr(arguments, name) for name in Axes.__annotations__})
    load = Load(
        arguments.requests, axes.prompt_tokens[0], axes.output_tokens[0], axes.concurrency[0]
    )
    context = max(axes.prompt_tokens) + max(axes.output_tokens) + SPARE_TOKENS
    tiny = arguments.short and arguments.model is None
    engine = {
        "dtype": "bfloat16",
        "max-model-len": context + max(load.guard_tokens, load.system_tokens),
        "max-num-seqs": max(16, *axes.concurrency),
        "kv-cache-memory-bytes": (64 if tiny else 512) << 20,
        "generation-config": "vllm",
        "seed": 0,
    }
    center = Cell(
        "center",
        axes.tenants[0],
        axes.rank[0],
        VECTOR_RANK,
        load,
        compiled=axes.mode[0] == "compiled",
        engine=engine | dict(arguments.engine),
    )
    cells = make_cells(axes, center, arguments.cells, on_cpu=cpu, starts=arguments.starts)
    if arguments.arms is None:
        return cells
    named = {parse_arm(name) for name in arguments.arms}
    wanted = named | {arm.engine(cpu) for arm in named}
    if not any(arm.kind == "aside" for arm in named):  # which is something to compare with
        wanted.add(parse_arm(baseline(cpu)))
    chosen = [replace(c, arms=tuple(a for a in c.arms if a in wanted)) for c in cells]
    return [cell for cell in chosen if len(cell.arms) > 1]


def model_of(arguments: argparse.Namespace) -> tuple[Path, str]:
    """The checkpoint and its name."""
    if arguments.model is not None:
        return arguments.model.resolve(), arguments.model.name
    if arguments.short:
        return write_tiny_model(arguments.build / "tiny-model"), "tiny-model"
    return write_base(ROOT / "build" / "smollm2" / "base"), "SmolLM2-135M-Instruct"


def run(arguments: argparse.Namespace) -> report.Result:
    """Measure what is missing and return the result of all cells."""
    cpu = on_cpu()
    cells = cells_of(arguments, cpu=cpu)
    model, name = model_of(arguments)
    cache = ResultCache(arguments.build / "runs", provenance(arguments.threads) | {"model": name})
    for cell in cells if arguments.fresh else ():
        cache.clear(cell)
    # No refresh thread: it would take CPU time from what is measured.
    with Progress(console=CONSOLE, auto_refresh=False) as progress:

        def log(text: str) -> None:
            CONSOLE.print(text, markup=False, highlight=False)
            progress.refresh()

        folder = arguments.build / "artifacts" / name
        settle_s = 0.0 if arguments.short else SETTLE_S
        threads = arguments.threads
        bench = Bench(model, folder, cache, arguments.rounds, threads, cpu, log, settle_s)
        runs = sum(len(c.arms) * len(cache.missing(c, arguments.rounds)) for c in cells)
        task = progress.add_task("runs of bench serve", total=runs)
        for cell in cells:
            measure(bench, cell, lambda: progress.advance(task))
    return report.make_result(cells, cache, on_cpu=cpu, short=arguments.short)


def _exit(number: int, frame: object) -> None:
    raise SystemExit(128 + number)  # runs every `finally`: servers stop, complete rounds stay


def main() -> None:
    arguments = parse()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit)
    try:
        result = run(arguments)
        report.print_tables(result)
        folder = arguments.build / ("short" if arguments.short else "full")
        CONSOLE.print(f"the page is {report.write_result(result, folder, 'run')}", markup=False)
        if arguments.publish:
            CONSOLE.print(f"published: {report.publish(result, ROOT / 'docs')}", markup=False)
    except SafegeneError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    print_result("serving", result)


if __name__ == "__main__":
    main()
