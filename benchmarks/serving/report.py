"""Results of the serving benchmark: ratios, aims, roofline estimates, tables, plots and page.

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

from matplotlib.figure import Figure
from rich.console import Console

from benchmarks.plots import draw_lines, draw_ratios
from benchmarks.results import CONSOLE, Rows, Spread, markdown, ratio, spread, spread_text, table
from benchmarks.serving.arms import Arm, comparisons, parse_arm
from benchmarks.serving.artifacts import Artifacts
from benchmarks.serving.cells import GROUPS, Cell
from benchmarks.serving.measure import ResultCache, Round
from benchmarks.serving.server import slot_rank
from safegene_vllm.errors import ConfigError
from safegene_vllm.formats.file_io import read_json, replace_file
from safegene_vllm.report.figure import save

Result = dict[str, Any]

SPEED = "output_tokens_per_s"
TTFT, ITL = "ttft_p50_ms", "itl_p50_ms"
DECODE_STEP, PROMPT_TOKEN = "decode_step_ms", "prompt_token_us"
ROUND_METRICS = (
    *(SPEED, "total_tokens_per_s", TTFT, "ttft_p99_ms", ITL, "itl_p99_ms", "e2e_p50_ms"),
    *(DECODE_STEP, PROMPT_TOKEN),
)
START_METRICS = ("start_s", "load_weights_s")
MIB = 1 << 20
PAGE, FOLDER, NOTES = "performance.md", "performance", "notes.md"


# Ratios, aims and estimates


def series(rounds: Sequence[Round], arm: str, metric: str) -> list[float | None]:
    """One metric of one arm, a value per round."""
    return [found.get(arm, {}).get(metric) for found in rounds]


def medians(rounds: Sequence[Round], arm: str) -> dict[str, Spread]:
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
) -> dict[str, Any]:
    """Spreads by `<cell>.<arm>_over_<other>.<metric>`, of every ratio that can be formed."""
    found: dict[str, Any] = {}
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
    offline = "exported_100" if on_cpu else "exported_stock_100"
    over_vllm, halves = "main.lora_over_lora_stock", "gain table on half of the layers"
    found: list[tuple[str, str, float | None, float | None]] = [
        (f"{halves}, throughput", f"{half}.{SPEED}", 0.98, None),
        (f"{halves}, first token", f"{half}.{TTFT}", None, 1.03),
        (f"{halves}, between tokens", f"{half}.{ITL}", None, 1.03),
        (f"{halves}, a prompt token", f"{half}.{PROMPT_TOKEN}", None, 1.03),
        (f"{halves}, a decode step", f"{half}.{DECODE_STEP}", None, 1.03),
        ("gain table on all layers, throughput", f"{whole}.{SPEED}", 0.95, None),
        (
            "64 distinct profiles over 1, throughput",
            f"profiles.gain_100_over_gain_100_p1.{SPEED}",
            0.98,
            None,
        ),
        (
            "gain table over adapters merged offline, throughput",
            f"by_hand.gain_100_over_{offline}.{SPEED}",
            1.2,
            None,
        ),
        (
            "the same, 8 tenants of rank 64",
            f"by_hand_large.gain_100_over_{offline}.{SPEED}",
            1.2,
            None,
        ),
        (
            "weight load over the merged checkpoint, throughput",
            f"checkpoint.weights_100_over_reloaded_100.{SPEED}",
            0.99,
            1.01,
        ),
        (
            "weight load over the merged checkpoint, seconds to load weights",
            "checkpoint.weights_100_over_merged_100.load_weights_s",
            None,
            1.10,
        ),
        ("our LoRA product over vLLM's, first token", f"{over_vllm}.{TTFT}", None, 0.2),
        ("our LoRA product over vLLM's, between tokens", f"{over_vllm}.{ITL}", None, 0.77),
    ]
    return found if on_cpu else found[:-2]


def judge(ratios: Mapping[str, Any], *, on_cpu: bool) -> list[dict[str, Any]]:
    """Every aim with the ratio found and `met`: true, false, or None if it was not measured."""
    judged = []
    for what, name, low, high in aims(on_cpu):
        found, met = ratios.get(name), None
        if found is not None:
            met = (low is None or found["median"] >= low) and (
                high is None or found["median"] <= high
            )
        bound = f"{low:g} to {high:g}" if low and high else ""
        bound = bound or (f"at least {low:g}" if low else f"at most {high:g}")
        judged.append({"what": what, "ratio": name, "bound": bound, "found": found, "met": met})
    return judged


NOT_ESTIMATED = ("guard", "system_prompt")
BYTES = 2
"""Bytes of a value in bfloat16 or float16."""


def estimates(cell: Cell, artifacts: Artifacts, *, on_cpu: bool) -> dict[str, float]:
    """Roofline estimates of the ratios of time to first token and between tokens.

    Decode is bound by the bytes of weights, LoRA slots and vector, prefill by the products of a
    prompt token (Williams et al. 2009); attention, caches, launches and HTTP are left out. vLLM's
    LoRA product on CPU gathers copies per token and is not estimated.
    """
    linear = sum(d_out * d_in for d_out, d_in in artifacts.modules.values())

    def rank_widths(arm: Arm) -> tuple[int, int]:
        """Rank times width of one tenant's slot, and of the vector in the gain table."""
        slot = slot_rank(arm, cell) * artifacts.width if arm.has_tenants else 0
        vector = cell.vector_rank * artifacts.vector_width(arm.layers) if arm.kind == "gain" else 0
        return slot, vector

    def decode_bytes(arm: Arm) -> int:
        slot, vector = rank_widths(arm)
        tenants = min(cell.tenants, cell.load.concurrency)
        return artifacts.model_bytes + BYTES * (tenants * slot + vector)

    def prefill_flops(arm: Arm) -> int:
        return 2 * (linear + sum(rank_widths(arm)))

    excluded = (*NOT_ESTIMATED, *(("lora_stock", "exported_stock") if on_cpu else ()))
    found: dict[str, float] = {}
    for arm, other in comparisons(cell.arms, on_cpu):
        if arm.kind not in excluded and other.kind not in excluded:
            name = f"{cell.name}.{arm.name}_over_{other.name}"
            found[f"{name}.{TTFT}"] = round(prefill_flops(arm) / prefill_flops(other), 4)
            found[f"{name}.{ITL}"] = round(decode_bytes(arm) / decode_bytes(other), 4)
    return found


# The result


def cell_result(cell: Cell, cache: ResultCache) -> Result | None:
    """Settings and, by arm, spreads of rounds and starts and what was measured after them.

    None if no round is complete.
    """
    rounds, starts = cache.rounds(cell), cache.rounds(cell, "start")
    if not rounds:
        return None
    after = [*cache.rounds(cell, "after"), {}][0]
    arms = {}
    for arm in cell.arms:
        numbers = {name: v for name, v in after.get(arm.name, {}).items() if v is not None}
        arms[arm.name] = {
            "title": arm.title,
            "rounds": medians(rounds, arm.name),
            "starts": medians(starts, arm.name),
            "after": {name: float(f"{value:.6g}") for name, value in numbers.items()},
        }
    commit = cache.provenance["commit"]
    return {"commit": commit, "settings": cell.settings(), "rounds": len(rounds), "arms": arms}


def make_result(
    cells: Sequence[Cell],
    cache: ResultCache,
    artifacts: Mapping[str, Artifacts],
    *,
    on_cpu: bool,
    short: bool,
) -> Result:
    """The result of all `cells` as one JSON value; unmeasured ones are listed under `missing`."""
    found = {cell.name: cell_result(cell, cache) for cell in cells}
    ratios: dict[str, Any] = {}
    predicted: dict[str, float] = {}
    for cell in cells:
        rounds, starts = cache.rounds(cell), cache.rounds(cell, "start")
        ratios |= named_ratios(cell.name, cell.arms, rounds, starts, on_cpu=on_cpu)
        predicted |= estimates(cell, artifacts[cell.name], on_cpu=on_cpu)
    return {
        **cache.provenance,
        "short": short,
        "cells": {name: result for name, result in found.items() if result is not None},
        "ratios": ratios,
        "predicted": {name: value for name, value in predicted.items() if name in ratios},
        "aims": judge(ratios, on_cpu=on_cpu),
        "missing": [name for name, result in found.items() if result is None],
    }


# Tables

COLUMNS = (
    ("output tok/s", "rounds", SPEED, "{:.1f}", 1),
    ("TTFT p50 ms", "rounds", TTFT, "{:.0f}", 1),
    ("TTFT p99 ms", "rounds", "ttft_p99_ms", "{:.0f}", 1),
    ("ITL p50 ms", "rounds", ITL, "{:.1f}", 1),
    ("ITL p99 ms", "rounds", "itl_p99_ms", "{:.0f}", 1),
    ("decode step ms", "rounds", DECODE_STEP, "{:.1f}", 1),
    ("prompt token µs", "rounds", PROMPT_TOKEN, "{:.0f}", 1),
    ("RSS MiB", "after", "rss_bytes", "{:.0f}", MIB),
    ("peak MiB", "after", "peak_bytes", "{:.0f}", MIB),
    ("vector MiB", "after", "vector_bytes", "{:.2f}", MIB),
    ("slots MiB", "after", "slot_bytes", "{:.1f}", MIB),
    ("start s", "starts", "start_s", "{:.1f}", 1),
    ("weights s", "starts", "load_weights_s", "{:.2f}", 1),
    ("load s", "after", "load_s", "{:.3f}", 1),
    ("change s", "after", "change_s", "{:.3f}", 1),
)
"""Title, part of the result, metric, format and unit."""
PAGE_COLUMNS = tuple(c for c in COLUMNS if c[0] not in ("peak MiB", "TTFT p99 ms", "weights s"))


def arm_rows(result: Result, cell: str, columns: Sequence[Any] = COLUMNS) -> Rows:
    """A row per arm; columns that no arm has are left out."""
    arms = result["cells"][cell]["arms"]
    used = [c for c in columns if any(c[2] in found[c[1]] for found in arms.values())]

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
    metrics = [
        m for m in (SPEED, TTFT, ITL, DECODE_STEP, PROMPT_TOKEN) if any(n[2] == m for n in names)
    ]
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


def estimate_rows(result: Result) -> Rows:
    """A row per roofline estimate next to what was measured."""
    rows = [
        (f"`{name}`", f"{expected:.3f}", spread_text(result["ratios"][name]))
        for name, expected in result["predicted"].items()
    ]
    return ("ratio", "roofline estimate", "measured"), rows


def axis_rows(result: Result) -> Rows:
    """A row per cell with the gain table on all layers over the same engine with it disabled."""
    pairs = [("aside_100", DECODE_STEP), ("aside_100", PROMPT_TOKEN), ("aside_100", SPEED)]
    pairs.append(("composed_100", SPEED))
    rows = []
    for cell, found in result["cells"].items():
        names = [f"{cell}.gain_100_over_{other}.{metric}" for other, metric in pairs]
        if names[0] in result["ratios"]:
            spreads = [result["ratios"].get(name) for name in names]
            rows.append((f"`{cell}`", str(found["rounds"]), *map(spread_text, spreads)))
    heading = ("decode step", "prompt token", "output tok/s", "output tok/s over composed slots")
    return ("cell", "rounds", *heading), rows


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


def missing_lines(result: Result) -> list[str]:
    """What a full run would contain and this one does not."""
    cells = set(result["cells"])
    prefixes = {"length": ("prompt_",), "mode": ("compiled", "eager")}
    found = [f"the cell `{cell}` was not measured" for cell in result["missing"]]
    found += [
        f"no cell of the group `{group}`"
        for group in GROUPS
        if group not in cells
        and not any(c.startswith(prefixes.get(group, (f"{group}_",))) for c in cells)
    ]
    short = ["the short run on a tiny model: it shows that the program works"]
    return found + (short if result["short"] else [])


def print_tables(result: Result, console: Console = CONSOLE) -> None:
    """Print every table of the result."""
    for cell in result["cells"]:
        console.print(table(arm_rows(result, cell), f"{cell}: {settings_text(result, cell)}"))
        console.print(table(ratio_rows(result, cell), f"{cell}: ratios within a round"))
    console.print(table(estimate_rows(result), "roofline estimates, not measurements"))
    console.print(table(aim_rows(result), "aims"))
    for line in missing_lines(result):
        console.print(f"missing: {line}", markup=False)


# Plots and page

AXES = {"tenants": "tenants", "rank": "rank of the tenants' adapters", "concurrency": "in flight"}
"""Groups of cells along one axis, and the axis' label."""
RATIO_CELLS = ("main", "paired")
"""Cells whose ratios are plotted."""


def axis_points(result: Result, group: str) -> list[tuple[int, str]]:
    """(value, cell) along one axis, the center among them."""
    found = []
    for cell, values in result["cells"].items():
        settings = {**values["settings"]["load"], **values["settings"]}
        if cell == "main" or re.fullmatch(rf"{group}_\d+", cell):
            found.append((int(settings[group]), cell))
    return sorted(found)


def draw_axis(result: Result, group: str) -> Figure:
    """Output tokens per second of every arm along one axis, medians with their range."""
    points = axis_points(result, group)
    cells = result["cells"]
    arms = dict.fromkeys(arm for _, cell in points if cell != "main" for arm in cells[cell]["arms"])
    lines: dict[str, list[list[float]]] = {}
    for value, cell in points:
        for arm in arms:
            found = cells[cell]["arms"].get(arm, {"rounds": {}})["rounds"].get(SPEED)
            if found:
                point = [value, found["median"], found["min"], found["max"]]
                lines.setdefault(parse_arm(arm).title, []).append(point)
    return draw_lines(lines, AXES[group], "output tokens per second")


def write_plots(result: Result, folder: Path, stem: str) -> list[Path]:
    """Write SVG files of ratios and axes; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Figure] = {}
    for cell in RATIO_CELLS:
        ratios = {
            name.split(".")[1].replace("_over_", " / "): found
            for name, found in result["ratios"].items()
            if name.startswith(f"{cell}.") and name.endswith(f".{SPEED}")
        }
        if ratios:
            figures[cell] = draw_ratios(ratios, f"ratio of {SPEED}")
    for group in AXES:
        if len(axis_points(result, group)) > 1:
            figures[f"axis_{group}"] = draw_axis(result, group)
    paths = {folder / f"{stem}-{name}.svg": figure for name, figure in figures.items()}
    for path, figure in paths.items():
        save(figure, path)
    return list(paths)


HEAD = """# Performance

Cost of safety in a real server, over HTTP with vLLM's own `bench serve`: random prompts of exact
length, greedy, full output length, closed loop, random weights. `make bench-serving ARGS=--publish`
writes this page from the JSON files in docs/performance; `python -m benchmarks.serving.report FILE`
prints all of a result's tables: every cell, arm and ratio, and the roofline estimates.

Arms of a cell are alive together, get equal engine settings and prompts, and run in interleaved
rounds (A B, B A). A ratio is formed within a round: the median, with the minimum and maximum in
brackets. Above 1 is better for tokens per second, below 1 for times. The baseline on CPU uses our
LoRA product, because vLLM's own gathers a copy of the weights for every token."""


def device_slug(result: Result) -> str:
    """A file name for the device of the result."""
    name = result["device"] if result["device"] != "cpu" else f"cpu {result['processor']}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def section(result: Result, plots: Sequence[str]) -> list[str]:
    """One device's part of the page; `plots` are file names below docs/performance."""
    device = result["processor"] if result["device"] == "cpu" else result["device"]
    threads = f", {result['threads']} thread(s) per engine" if "threads" in result else ""
    lines = [
        f"## {device}",
        "",
        f"{result['cores']} cores, {result['memory_gib']} GiB{threads}; {result['vllm']}, torch "
        f"{result['torch']}, Python {result['python']}; model {result['model']}. Missing: "
        f"{'; '.join(missing_lines(result)) or 'nothing'}.",
        "",
        *markdown(aim_rows(result)),
        "",
    ]
    if "main" in result["cells"]:
        lines += [f"`main`: {settings_text(result, 'main')}.", ""]
        lines += [*markdown(arm_rows(result, "main", PAGE_COLUMNS)), ""]
    rows = axis_rows(result)
    if rows[1]:
        lines += ["Gain table on all layers over the same engine with its vector disabled:", ""]
        lines += [*markdown(rows), ""]
    lines += [" ".join(f"![{plot[:-4]}]({FOLDER}/{plot})" for plot in plots)]
    return lines


def page(results: Sequence[tuple[Result, Sequence[str]]], notes: str = "") -> str:
    """The whole page: head, each result with the names of its plots, notes."""
    parts = [HEAD, *("\n".join(section(result, plots)) for result, plots in results), notes]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def write_page(docs: Path) -> Path:
    """Write the page from everything in docs/performance. Raises: ConfigError if it is empty."""
    folder = docs / FOLDER
    results = [
        (read_json(path), sorted(plot.name for plot in folder.glob(f"{path.stem}-*.svg")))
        for path in sorted(folder.glob("*.json"))
    ]
    if not results:
        raise ConfigError(f"{folder} contains no results; run make bench-serving ARGS=--publish")
    notes = folder / NOTES
    text = page(results, notes.read_text(encoding="utf-8") if notes.is_file() else "")
    replace_file(docs / PAGE, text.encode())
    return docs / PAGE


def merge_results(last: Result, new: Result) -> Result:
    """`new` with the cells of `last` that it lacks; each cell records its own commit.

    `new` alone if versions, device, model or threads differ.
    """
    same = ("vllm", "torch", "python", "device", "processor", "cores", "threads", "model", "short")
    if any(last.get(name) != new.get(name) for name in same):
        return new

    def both(part: str) -> dict[str, Any]:
        kept = {k: v for k, v in last[part].items() if k.split(".")[0] not in new["cells"]}
        return {**kept, **new[part]}

    ratios = both("ratios")
    return {
        **new,
        **{part: both(part) for part in ("cells", "predicted")},
        "ratios": ratios,
        "aims": judge(ratios, on_cpu=new["device"] == "cpu"),
        "missing": [cell for cell in new["missing"] if cell not in last["cells"]],
    }


def publish(result: Result, docs: Path) -> Path:
    """Write `result` and its plots into docs/performance, merged with the device's last result.

    Raises: ConfigError for a short run or a commit with uncommitted changes.
    """
    if result["short"] or "+" in result["commit"]:
        raise ConfigError(
            f"commit {result['commit']}, short: {result['short']}; only a full run of a clean "
            "commit is published"
        )
    folder, stem = docs / FOLDER, device_slug(result)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{stem}-*.svg"):
        old.unlink()
    path = folder / f"{stem}.json"
    if path.is_file():
        result = merge_results(read_json(path), result)
    replace_file(path, (json.dumps(result, indent=1) + "\n").encode())
    write_plots(result, folder, stem)
    return write_page(docs)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print_tables(read_json(Path(argument)))
