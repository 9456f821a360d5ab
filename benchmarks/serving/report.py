"""Results of the serving benchmark: ratios, aims, tables and page.

    python -m benchmarks.serving.report docs/performance/cpu-amd-epyc.json

prints every table of a published result. docs/performance.md is written from such results and
docs/performance/notes.md by `make bench-serving ARGS=--publish`, and not edited itself.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import (
    CONSOLE,
    Rows,
    markdown,
    ratio,
    spread,
    spread_text,
    table,
)
from benchmarks.serving.arms import Arm, comparisons, parse_arm
from benchmarks.serving.cells import Cell
from benchmarks.serving.measure import ResultCache, Round
from safegene_vllm.errors import ConfigError
from safegene_vllm.formats.file_io import read_json, replace_file

Result = dict[str, Any]

SPEED = "output_tokens_per_s"
TTFT, ITL = "ttft_p50_ms", "itl_p50_ms"
DECODE_STEP, PROMPT_TOKEN = "decode_step_ms", "prompt_token_us"
ROUND_METRICS = (SPEED, TTFT, "ttft_p99_ms", ITL, "itl_p99_ms", DECODE_STEP, PROMPT_TOKEN)
START_METRICS = ("start_s", "load_weights_s")
PAGE, FOLDER, NOTES = "performance.md", "performance", "notes.md"


# Ratios and aims


def series(rounds: Sequence[Round], arm: str, metric: str) -> list[float | None]:
    """One metric of one arm, a value per round."""
    return [found.get(arm, {}).get(metric) for found in rounds]


def spreads(rounds: Sequence[Round], arm: str) -> Result:
    """Spread of every metric that the arm has in any round."""
    metrics = dict.fromkeys(name for found in rounds for name in found.get(arm, {}))
    values = {m: [v for v in series(rounds, arm, m) if v is not None] for m in metrics}
    return {metric: spread(found) for metric, found in values.items() if found}


def named_ratios(
    cell: str,
    arms: Sequence[Arm],
    rounds: Sequence[Round],
    starts: Sequence[Round],
    *,
    on_cpu: bool,
) -> Result:
    """Spreads by `<cell>.<arm>_over_<other>.<metric>`, of every ratio that can be formed."""
    found: Result = {}
    for arm, other in comparisons(arms, on_cpu):
        for metrics, source in ((ROUND_METRICS, rounds), (START_METRICS, starts)):
            for metric in metrics:
                value = ratio(series(source, arm.name, metric), series(source, other.name, metric))
                if value is not None:
                    found[f"{cell}.{arm.name}_over_{other.name}.{metric}"] = value
    return found


def aims(on_cpu: bool) -> list[tuple[str, str, float | None, float | None]]:
    """(what, ratio, lower bound, upper bound): bounds on the medians of named ratios."""
    half, whole = "paired.gain_50_over_aside_50", "paired.gain_100_over_aside_100"
    offline = f"gain_100_over_exported{'' if on_cpu else '_stock'}_100.{SPEED}"
    profiles = f"profiles.gain_100_over_gain_100_p1.{SPEED}"
    weights, ours = "checkpoint.weights_100_over", "main.lora_over_lora_stock"
    halves, loading = "gain table on half of the layers", "weight load over the merged checkpoint"
    found: list[tuple[str, str, float | None, float | None]] = [
        (f"{halves}, throughput", f"{half}.{SPEED}", 0.98, None),
        (f"{halves}, first token", f"{half}.{TTFT}", None, 1.03),
        (f"{halves}, between tokens", f"{half}.{ITL}", None, 1.03),
        (f"{halves}, a prompt token", f"{half}.{PROMPT_TOKEN}", None, 1.03),
        (f"{halves}, a decode step", f"{half}.{DECODE_STEP}", None, 1.03),
        ("gain table on all layers, throughput", f"{whole}.{SPEED}", 0.95, None),
        ("64 distinct profiles over 1, throughput", profiles, 0.98, None),
        ("gain table over adapters merged offline, throughput", f"by_hand.{offline}", 1.2, None),
        ("the same, 8 tenants of rank 64", f"by_hand_large.{offline}", 1.2, None),
        (f"{loading}, throughput", f"{weights}_reloaded_100.{SPEED}", 0.99, 1.01),
        (f"{loading}, seconds to load weights", f"{weights}_merged_100.load_weights_s", None, 1.10),
        ("our LoRA product over vLLM's, first token", f"{ours}.{TTFT}", None, 0.2),
        ("our LoRA product over vLLM's, between tokens", f"{ours}.{ITL}", None, 0.77),
    ]
    return found if on_cpu else found[:-2]


def judge(ratios: Mapping[str, Any], *, on_cpu: bool) -> list[Result]:
    """Every aim with the ratio found and `met`: true, false, or None if it was not measured."""
    judged = []
    for what, name, low, high in aims(on_cpu):
        found = ratios.get(name)
        met = None if found is None else (low or 0) <= found["median"] <= (high or float("inf"))
        bound = f"{low:g} to {high:g}" if low and high else ""
        bound = bound or (f"at least {low:g}" if low else f"at most {high:g}")
        judged.append({"what": what, "ratio": name, "bound": bound, "found": found, "met": met})
    return judged


# The result


def make_result(cells: Sequence[Cell], cache: ResultCache, *, on_cpu: bool, short: bool) -> Result:
    """The result of all `cells` as one JSON value; those without a complete round are `missing`.

    Settings and, by arm, spreads of rounds and starts and what was measured after them.
    """
    found: Result = {}
    ratios: Result = {}
    for cell in cells:
        rounds, starts = list(cache.read(cell).values()), list(cache.read(cell, "start").values())
        if not rounds:
            continue
        after = cache.read(cell, "after").get(0, {})
        arms = {
            arm.name: {
                "title": arm.title,
                "rounds": spreads(rounds, arm.name),
                "starts": spreads(starts, arm.name),
                "after": dict(after.get(arm.name, {})),
            }
            for arm in cell.arms
        }
        commit, settings = cache.provenance["commit"], cell.settings()
        numbers = {"commit": commit, "settings": settings, "rounds": len(rounds), "arms": arms}
        found[cell.name] = numbers
        ratios |= named_ratios(cell.name, cell.arms, rounds, starts, on_cpu=on_cpu)
    return {
        **cache.provenance,
        "short": short,
        "cells": found,
        "ratios": ratios,
        "aims": judge(ratios, on_cpu=on_cpu),
        "missing": [cell.name for cell in cells if cell.name not in found],
    }


# Tables

COLUMNS = (
    ("output tok/s", "rounds", SPEED, "{:.1f}", 1),
    ("TTFT p50 ms", "rounds", TTFT, "{:.0f}", 1),
    ("ITL p50 ms", "rounds", ITL, "{:.1f}", 1),
    ("ITL p99 ms", "rounds", "itl_p99_ms", "{:.0f}", 1),
    ("decode step ms", "rounds", DECODE_STEP, "{:.1f}", 1),
    ("prompt token µs", "rounds", PROMPT_TOKEN, "{:.0f}", 1),
    ("RSS MiB", "after", "rss_bytes", "{:.0f}", 1 << 20),
    ("vector MiB", "after", "vector_bytes", "{:.2f}", 1 << 20),
    ("slots MiB", "after", "slot_bytes", "{:.1f}", 1 << 20),
    ("start s", "starts", "start_s", "{:.1f}", 1),
)
"""Title, part of the result, metric, format and unit."""


def arm_rows(result: Result, cell: str) -> Rows:
    """A row per arm; columns that no arm has are left out."""
    arms = result["cells"][cell]["arms"]
    used = [c for c in COLUMNS if any(c[2] in found[c[1]] for found in arms.values())]

    def text(found: Any, form: str, unit: float) -> str:
        value = found["median"] if isinstance(found, Mapping) else found
        return "–" if value is None else form.format(value / unit)

    rows = [
        (
            parse_arm(name).title,
            *(text(found[part].get(metric), form, unit) for _, part, metric, form, unit in used),
        )
        for name, found in arms.items()
    ]
    return ("arm", *(column[0] for column in used)), rows


def ratio_rows(result: Result, cell: str) -> Rows:
    """A row per comparison in the cell."""
    names = [n.split(".") for n in result["ratios"] if n.startswith(f"{cell}.")]
    metrics = [m for m in ROUND_METRICS if "p99" not in m and any(n[2] == m for n in names)]
    rows = []
    for compared in dict.fromkeys(name[1] for name in names):
        arm, other = (parse_arm(name).title for name in compared.split("_over_"))
        found = (result["ratios"].get(f"{cell}.{compared}.{metric}") for metric in metrics)
        rows.append((f"{arm} / {other}", *map(spread_text, found)))
    return ("ratio", *metrics), rows


def aim_rows(result: Result) -> Rows:
    """A row per aim: bound, ratio and verdict."""
    words = {True: "met", False: "missed", None: "not measured"}
    rows = [
        (aim["what"], aim["bound"], spread_text(aim["found"]), words[aim["met"]])
        for aim in judge(result["ratios"], on_cpu=result["device"] == "cpu")
    ]
    return ("aim", "bound", "found", "verdict"), rows


def axis_rows(result: Result) -> Rows:
    """A row per cell with the gain table on all layers over the same engine with it disabled."""
    others = {
        "decode step": ("aside_100", DECODE_STEP),
        "prompt token": ("aside_100", PROMPT_TOKEN),
        "output tok/s": ("aside_100", SPEED),
        "output tok/s over composed slots": ("composed_100", SPEED),
    }
    rows = []
    for cell, found in result["cells"].items():
        names = [f"{cell}.gain_100_over_{other}.{metric}" for other, metric in others.values()]
        if names[0] in result["ratios"]:
            texts = (spread_text(result["ratios"].get(name)) for name in names)
            rows.append((f"`{cell}`", str(found["rounds"]), *texts))
    return ("cell", "rounds", *others), rows


def settings_text(result: Result, cell: str) -> str:
    """The cell's settings as one sentence."""
    found = result["cells"][cell]
    settings, load = found["settings"], found["settings"]["load"]
    mode = "compiled" if settings["compiled"] else "eager"
    return (
        f"{settings['tenants']} tenants of rank {settings['rank']}, vector of rank "
        f"{settings['vector_rank']}, {mode}; {load['requests']} requests of "
        f"{load['prompt_tokens']} + {load['output_tokens']} tokens, {load['concurrency']} at a "
        f"time; {found['rounds']} rounds, commit `{found['commit']}`"
    )


def print_tables(result: Result) -> None:
    """Print every table of the result."""
    for cell in result["cells"]:
        CONSOLE.print(table(arm_rows(result, cell), f"{cell}: {settings_text(result, cell)}"))
        CONSOLE.print(table(ratio_rows(result, cell), f"{cell}: ratios within a round"))
    CONSOLE.print(table(aim_rows(result), "aims"))
    CONSOLE.print(f"not measured: {', '.join(result['missing']) or 'nothing'}", markup=False)


# The page

HEAD = """# Performance

Cost of safety in a real server, over HTTP with vLLM's own `bench serve`: random prompts of exact
length, greedy, full output length, closed loop, random weights. `make bench-serving ARGS=--publish`
writes this page from the JSON files in docs/performance; `python -m benchmarks.serving.report FILE`
prints all of a result's tables: every cell, arm and ratio.

Arms of a cell are alive together, get equal engine settings and prompts, and run in interleaved
rounds (A B, B A). A ratio is formed within a round: the median, with the minimum and maximum in
brackets. Above 1 is better for tokens per second, below 1 for times. The baseline on CPU uses our
LoRA product, because vLLM's own gathers a copy of the weights for every token.
"""


def device_slug(result: Result) -> str:
    """A file name for the device of the result."""
    name = result["device"] if result["device"] != "cpu" else f"cpu {result['processor']}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def section(result: Result) -> str:
    """One device's part of the page."""
    device = result["processor"] if result["device"] == "cpu" else result["device"]
    threads = f", {result['threads']} thread(s) per engine" if "threads" in result else ""
    lines = [
        f"## {device}\n",
        f"{result['cores']} cores, {result['memory_gib']} GiB{threads}; {result['vllm']}, torch "
        f"{result['torch']}, Python {result['python']}; model {result['model']}. Not measured: "
        f"{', '.join(result['missing']) or 'nothing'}.\n",
        *markdown(aim_rows(result)),
    ]
    if "main" in result["cells"]:
        lines += [f"\n`main`: {settings_text(result, 'main')}.\n"]
        lines += markdown(arm_rows(result, "main"))
    lines += ["\nGain table on all layers over the same engine with its vector disabled:\n"]
    lines += markdown(axis_rows(result))
    return "\n".join(lines)


def write_page(docs: Path) -> Path:
    """Write the page from everything in docs/performance. Raises: ConfigError if it is empty."""
    folder = docs / FOLDER
    parts = [HEAD, *(section(read_json(path)) for path in sorted(folder.glob("*.json")))]
    if len(parts) == 1:
        raise ConfigError(f"{folder} contains no results; run make bench-serving ARGS=--publish")
    notes = folder / NOTES
    if notes.is_file():
        parts.append(notes.read_text(encoding="utf-8"))
    replace_file(docs / PAGE, ("\n\n".join(part.strip() for part in parts) + "\n").encode())
    return docs / PAGE


def merge_results(last: Result, new: Result) -> Result:
    """`new` with the cells of `last` that it lacks; each cell records its own commit.

    `new` alone if versions, device, model or threads differ.
    """
    same = ("vllm", "torch", "python", "device", "processor", "cores", "threads", "model", "short")
    if any(last.get(name) != new.get(name) for name in same):
        return new
    old = {k: v for k, v in last["ratios"].items() if k.split(".")[0] not in new["cells"]}
    ratios = {**old, **new["ratios"]}
    return {
        **new,
        "cells": {**last["cells"], **new["cells"]},
        "ratios": ratios,
        "aims": judge(ratios, on_cpu=new["device"] == "cpu"),
        "missing": [cell for cell in new["missing"] if cell not in last["cells"]],
    }


def write_result(result: Result, docs: Path, stem: str) -> Path:
    """Write `result` and the page below `docs`."""
    folder = docs / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / f"{stem}.json", (json.dumps(result, indent=1) + "\n").encode())
    return write_page(docs)


def publish(result: Result, docs: Path) -> Path:
    """Write `result` into docs, merged with the device's last result.

    Raises: ConfigError for a short run or a commit with uncommitted changes.
    """
    if result["short"] or "+" in result["commit"]:
        raise ConfigError(
            f"commit {result['commit']}, short: {result['short']}; only a full run of a clean "
            "commit is published"
        )
    stem = device_slug(result)
    path = docs / FOLDER / f"{stem}.json"
    return write_result(
        merge_results(read_json(path), result) if path.is_file() else result, docs, stem
    )


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print_tables(read_json(Path(argument)))
