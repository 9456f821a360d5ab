"""`make bench-serving`: what does safety cost in a real server, against every other way to have it?

Servers per arm, asked through HTTP by vLLM's own `bench serve` in interleaved rounds; cells around
one center, one axis at a time. Resumable: whole rounds below build/serving are used again. Prints
tables, writes plots and a page, and ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples" / "smollm2"), str(ROOT / "benchmarks")]

from rich.console import Console
from rich.progress import Progress

import performance_page
import shown
from arms import fair_base, parse_arm
from cells import GROUPS, Axes, Cell, Load, make_cells
from charts import write_charts
from gathering import gather
from kept import Kept
from measuring import Bench, is_done, measure
from performance_page import page, publish
from provenance import on_cpu, origin
from random_world import write_pico
from safegene_vllm.errors import SafegeneError
from safegene_vllm.formats.file_io import replace_file

SHORT = {
    "tenants": (2,),
    "profiles": (2, 1),
    "prompt_tokens": (32,),
    "output_tokens": (8,),
    "concurrency": (4,),
    "rank": (8,),
    "mode": ("eager",),
    "cells": ("main", "paired"),
    "arms": ("gain_100", "aside_100", "composed_100", "guard", "system_prompt"),
    "requests": 24,
    "rounds": 2,
    "changes": 1,
    "starts": 1,
}
"""What --short asks for where nothing else is said."""
OUTSIDE = 128
"""Tokens of room beside prompt, output, guard and system prompt."""


def _setting(text: str) -> tuple[str, str]:
    """FLAG=VALUE as a pair."""
    name, equals, value = text.partition("=")
    if not equals or not name or name.startswith("-"):
        raise argparse.ArgumentTypeError(f"{text!r} is not FLAG=VALUE, FLAG without dashes")
    return name, value


def engine_flags(load: Load, *, pico: bool) -> dict[str, object]:
    """Engine settings that are the same for all arms."""
    context = load.prompt_tokens + load.output_tokens + OUTSIDE
    context += max(load.guard_tokens, load.system_tokens)
    return {
        "dtype": "bfloat16",
        "max-model-len": context,
        "max-num-seqs": max(16, load.concurrency),
        "kv-cache-memory-bytes": (64 if pico else 512) << 20,
        "generation-config": "vllm",
        "seed": 0,
    }


def parse(words: list[str] | None = None) -> argparse.Namespace:
    axes, parser = Axes(), argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="pico model, few arms, two rounds")
    parser.add_argument("--model", type=Path, help="checkpoint (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--cells", nargs="+", choices=GROUPS, default=GROUPS, help="default: all")
    parser.add_argument("--arms", nargs="+", help="only these, beside what they are compared with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=32, help="requests of one run of an arm")
    parser.add_argument("--changes", type=int, default=3, help="loads and changes that are timed")
    parser.add_argument("--starts", type=int, default=5, help="starts where loading is compared")
    first = "the first is the center, the others are measured around it"
    for name in ("tenants", "prompt_tokens", "output_tokens", "concurrency", "rank"):
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, nargs="+", default=getattr(axes, name), help=first)
    parser.add_argument("--profiles", type=int, nargs="+", default=axes.profiles, help="distinct")
    parser.add_argument(
        "--layers", type=int, nargs="+", default=axes.layers, help="per cent with a vector"
    )
    parser.add_argument("--mode", nargs="+", choices=("eager", "compiled"), default=axes.mode)
    parser.add_argument("--vector-rank", type=int, default=8, help="rank of the safety vector")
    parser.add_argument("--guard-tokens", type=int, default=192, help="the guard's template")
    parser.add_argument("--system-tokens", type=int, default=160, help="the safety system prompt")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--threads",
        type=int,
        default=max(1, cores - 1),
        help="per engine, on CPU (default: all cores but one, for its API process and the asking)",
    )
    parser.add_argument(
        "--engine",
        nargs="+",
        type=_setting,
        default=(),
        metavar="FLAG=VALUE",
        help="more vLLM flags for every arm, such as gpu-memory-utilization=0.1",
    )
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "serving")
    parser.add_argument("--fresh", action="store_true", help="measure these cells again")
    parser.add_argument("--report", action="store_true", help="measure nothing; tell what is kept")
    parser.add_argument("--publish", action="store_true", help="write docs/performance.md too")
    if parser.parse_args(words).short:
        parser.set_defaults(**SHORT)
    return parser.parse_args(words)


def cells_of(arguments: argparse.Namespace, *, cpu: bool) -> list[Cell]:
    """What is measured. Errors: ConfigError."""
    axes = Axes(**{name: getattr(arguments, name) for name in Axes.__annotations__})
    load = Load(
        requests=arguments.requests,
        prompt_tokens=axes.prompt_tokens[0],
        output_tokens=axes.output_tokens[0],
        concurrency=axes.concurrency[0],
        guard_tokens=arguments.guard_tokens,
        system_tokens=arguments.system_tokens,
    )
    longest = replace(
        load,
        prompt_tokens=max(axes.prompt_tokens),
        output_tokens=max(axes.output_tokens),
        concurrency=max(axes.concurrency),
    )
    center = Cell(
        "center",
        axes.tenants[0],
        axes.rank[0],
        arguments.vector_rank,
        load,
        compiled=axes.mode[0] == "compiled",
        changes=arguments.changes,
        engine=engine_flags(longest, pico=arguments.short and arguments.model is None)
        | dict(arguments.engine),
    )
    cells = make_cells(axes, center, arguments.cells, on_cpu=cpu, starts=arguments.starts)
    if arguments.arms is None:
        return cells
    named = {parse_arm(name) for name in arguments.arms}
    wanted = named | {arm.engine(cpu) for arm in named}
    if not any(arm.kind == "aside" for arm in named):  # which is a base to compare with
        wanted.add(parse_arm(fair_base(cpu)))
    chosen = [replace(c, arms=tuple(a for a in c.arms if a in wanted)) for c in cells]
    return [cell for cell in chosen if len(cell.arms) > 1]


def model_of(arguments: argparse.Namespace) -> tuple[Path, str]:
    """The checkpoint, written if it is one of ours, and its name."""
    if arguments.model is not None:
        return arguments.model.resolve(), arguments.model.name
    if arguments.short:
        return write_pico(arguments.build / "pico"), "pico"
    from base import write_base

    return write_base(ROOT / "build" / "smollm2" / "base"), "SmolLM2-135M-Instruct"


def run(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure what is missing, and gather everything that is there."""
    cpu = on_cpu()
    cells = cells_of(arguments, cpu=cpu)
    model, name = model_of(arguments)
    kept = Kept(arguments.build / "runs", origin(arguments.threads) | {"model": name})
    if arguments.fresh:
        for cell in cells:
            kept.forget(cell)
    # No thread that redraws: it would take time from what is measured.
    with Progress(console=console, auto_refresh=False) as progress:

        def say(text: str) -> None:
            console.print(text, markup=False, highlight=False)
            progress.refresh()

        worlds, rounds = arguments.build / "worlds" / name, arguments.rounds
        bench = Bench(model, worlds, kept, rounds, arguments.threads, cpu, say)
        if arguments.short:  # it shows that the program works, and no number of it is published
            bench = replace(bench, settle_s=0.0)
        runs = sum(len(c.arms) * len(kept.missing(c, "round", rounds)) for c in cells)
        task = progress.add_task("runs of bench serve", total=runs)
        for cell in cells:
            if not arguments.report and not is_done(bench, cell):
                measure(bench, cell, lambda: progress.advance(task))
    by_cell = {cell.name: bench.world(cell) for cell in cells}
    return gather(cells, kept, by_cell, on_cpu=cpu, short=arguments.short)


def tell(found: dict[str, Any], folder: Path, console: Console) -> None:
    """Tables for people; the page and its plots below `folder`."""
    for cell in found["cells"]:
        title = f"{cell}: {shown.settings_text(found, cell)}"
        console.print(shown.table(shown.arm_rows(found, cell), title))
        console.print(shown.table(shown.ratio_rows(found, cell), f"{cell}: ratios in one round"))
    console.print(shown.table(shown.predicted_rows(found), "predicted against measured"))
    console.print(shown.table(shown.aim_rows(found), "aims"))
    folder.mkdir(parents=True, exist_ok=True)
    charts = write_charts(found, folder / performance_page.FOLDER, "run")
    replace_file(folder / "result.json", json.dumps(found, indent=1).encode())
    text = page([(found, [chart.name for chart in charts])])
    replace_file(folder / performance_page.PAGE, text.encode())
    console.print(f"the page is {folder / performance_page.PAGE}", markup=False)


def leave(number: int, frame: object) -> None:
    """A signal's way out through every `finally`: servers are stopped, whole rounds stay kept."""
    raise SystemExit(128 + number)


def main() -> None:
    arguments = parse()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
    console = Console(width=None if sys.stdout.isatty() else 200)
    try:
        found = run(arguments, console)
        tell(found, arguments.build / ("short" if arguments.short else "full"), console)
        if arguments.publish:
            console.print(f"published: {publish(found, ROOT / 'docs')}", markup=False)
    except SafegeneError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    print(json.dumps(found))


if __name__ == "__main__":
    main()
