"""docs/performance.md, written from results; nobody edits the page itself.

Results lie beside it as docs/performance/<device>.json with their plots. What only people can say,
why a number is as it is, stands in docs/performance/notes.md and is taken in as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import shown
from aims import aims
from cells import GROUPS
from charts import write_charts
from safegene_vllm.errors import ConfigError
from safegene_vllm.formats.file_io import read_json, replace_file

PAGE = "performance.md"
FOLDER = "performance"
NOTES = "notes.md"

HEAD = """# Performance

What safety costs when it is served, against what would be run otherwise. Written by
`make bench-serving ARGS=--publish` from measured results; change the program, not this page.

Arms are servers of their own, asked through HTTP by vLLM's own `bench serve`: random prompts of
exact length, greedy, the full output length, a closed loop. All arms of a cell have the same engine
settings, are alive together and are asked in turn, forwards and backwards (A B, B A); all arms get
the same prompts in a round. A ratio is formed within a round; told are the median and, in brackets,
the least and the greatest round. Above 1 is better for tokens per second, below 1 for milliseconds.

- Tenants and vectors hold random values, on every linear site of the layers they are on; speed
  reads no values. Each tenant has coefficients of its own unless the arm says otherwise.
- In `paired` and along the axes, for fewer profiles and for weight load, both sides of a ratio are
  one process that is switched between runs: two processes that do the same work differ by more than
  safety costs. They get different prompts there, for neither may find the other's in the prefix
  cache. Weights that are read into a running engine leave traces in its `RSS`.
- On a CPU an engine's worker has its cores to itself; all else, vLLM's engine and API processes and
  the asking, runs on the others.
- `decode step` and `prompt token` are the worker's own: under the same load its vector is set aside
  and put back between its steps, every few decode steps and every step with a prompt. From run to
  run the machine changes by more than safety costs, from step to step it does not.
- "Tenants without safety" on our LoRA product is the fair base on CPU, where vLLM's own product
  gathers a copy of the weights for every token; on a GPU both are vLLM's.
- The guard is one more request to the same engine before every request: a template of its own in
  front of the prompt, one token out of the base model, and the request waits for it. A real guard
  has weights of its own and says more than a token, so this is its least cost.
- The system prompt is the same text before every prompt; vLLM's prefix cache is on, as it is by
  default, so from one cache block on it is not computed anew.
- `start s` is from the process's start to its first "ready"; `load s` a new tenant on the running
  server; `change s` other coefficients for a tenant: another revision for the plugin, export and
  load by hand, a new process for checkpoints. `RSS` counts shared pages of every process.
"""


def slug(result: Mapping[str, Any]) -> str:
    """A file's name for the device that the result is from."""
    named = result["device"] if result["device"] != "cpu" else f"cpu {result['processor']}"
    return re.sub(r"[^a-z0-9]+", "-", named.lower()).strip("-")


def _origin(result: Mapping[str, Any]) -> str:
    threads = f", {result['threads']} thread(s) per engine" if "threads" in result else ""
    device = result["processor"] if result["device"] == "cpu" else result["device"]
    return (
        f"{device}, {result['cores']} cores, {result['memory_gib']} GiB{threads}; "
        f"{result['vllm']}, torch {result['torch']}, Python {result['python']}; "
        f"model {result['model']}."
    )


def _cell(result: Mapping[str, Any], cell: str, charts: Sequence[str]) -> list[str]:
    lines = [f"### `{cell}`", "", shown.settings_text(result, cell) + ".", ""]
    lines += [*shown.markdown(shown.arm_rows(result, cell)), ""]
    rows = shown.ratio_rows(result, cell)
    if rows[1]:
        lines += [*shown.markdown(rows), ""]
    for chart in charts:
        if chart.endswith(f"-{cell}.svg"):
            lines += [f"![Ratios of tokens per second in {cell}]({FOLDER}/{chart})", ""]
    return lines


def _missing(result: Mapping[str, Any]) -> list[str]:
    """What a full run would have, and this one has not."""
    found = [f"- the cell `{cell}` was asked for and not measured" for cell in result["missing"]]
    there = set(result["cells"])
    absent = [
        group
        for group in GROUPS
        if not any(cell == group or cell.startswith(f"{group}_") for cell in there)
        and not (group == "length" and any(cell.startswith("prompt_") for cell in there))
        and not (group == "mode" and "compiled" in there)
    ]
    found += [f"- nothing of the group `{group}`" for group in absent]
    found += [
        f"- not measured: {aim['what']} (`{aim['ratio']}`)"
        for aim in result["aims"]
        if aim["met"] is None
    ]
    found += [
        f"- missed: {aim['what']}: {shown.spread_text(aim['found'])}, bound {aim['bound']}"
        for aim in result["aims"]
        if aim["met"] is False
    ]
    if result["short"]:
        found.append("- this was the short run, on a pico model: it shows that the program works")
    return found or ["Nothing."]


def section(result: Mapping[str, Any], charts: Sequence[str]) -> list[str]:
    """One device's part of the page; `charts` are file names below docs/performance."""
    name = result["processor"] if result["device"] == "cpu" else result["device"]
    lines = [f"## {name}", "", "### What was measured", "", _origin(result), ""]
    lines += [*shown.markdown(shown.aim_rows(result)), ""]
    for cell in result["cells"]:
        lines += _cell(result, cell, charts)
    for chart in charts:
        if "-axis_" in chart:
            axis = chart.rpartition("-axis_")[2].removesuffix(".svg")
            lines += [f"![Tokens per second along {axis}]({FOLDER}/{chart})", ""]
    lines += ["### Predicted against measured", ""]
    rows = shown.predicted_rows(result)
    lines += [
        "A roofline: decode bound by the bytes of weights, slots and vector that a step reads, "
        "prefill by the products a token takes; nothing else is in it.",
        "",
        *(shown.markdown(rows) if rows[1] else ["Nothing to predict."]),
        "",
        "### What is missing",
        "",
        *_missing(result),
        "",
    ]
    return lines


def page(results: Sequence[tuple[Mapping[str, Any], Sequence[str]]], notes: str = "") -> str:
    """The whole page: each result with the names of its plots, then the notes."""
    lines = [HEAD]
    for result, charts in results:
        lines += section(result, charts)
    return "\n".join(lines).rstrip() + "\n" + (f"\n{notes.strip()}\n" if notes.strip() else "")


def rewrite(docs: Path) -> Path:
    """Write the page anew from everything in docs/performance. Errors: ConfigError if empty."""
    folder = docs / FOLDER
    found = []
    for path in sorted(folder.glob("*.json")):
        charts = sorted(chart.name for chart in folder.glob(f"{path.stem}-*.svg"))
        found.append((read_json(path), charts))
    if not found:
        raise ConfigError(f"{folder} holds no results; run make bench-serving ARGS=--publish")
    notes = folder / NOTES
    text = page(found, notes.read_text(encoding="utf-8") if notes.is_file() else "")
    replace_file(docs / PAGE, text.encode())
    return docs / PAGE


def joined(last: Mapping[str, Any], now: Mapping[str, Any]) -> Mapping[str, Any]:
    """`now` with those cells of `last` that it has not; `now` alone if anything but the commit
    is another. Every cell names its own commit."""
    same = ("vllm", "torch", "python", "device", "processor", "cores", "threads", "model", "short")
    if any(last.get(name) != now.get(name) for name in same):
        return now
    cells = now["cells"]

    def add(part: str) -> dict[str, Any]:
        old = {k: v for k, v in last[part].items() if k.split(".")[0] not in cells}
        return {**old, **now[part]}

    ratios = add("ratios")
    return {
        **now,
        "cells": add("cells"),
        "ratios": ratios,
        "predicted": add("predicted"),
        "aims": [aim.judged(ratios) for aim in aims(now["device"] == "cpu")],
        "missing": [cell for cell in now["missing"] if cell not in last["cells"]],
    }


def publish(result: Mapping[str, Any], docs: Path) -> Path:
    """Put `result` and its plots into docs/performance, in place of the device's last, and rewrite.

    Cells that were measured before, with the same versions and model, and not now, stay.
    Errors: ConfigError for a short run, or one of a dirty tree: neither is to be quoted.
    """
    if result["short"] or "+" in result["commit"]:
        raise ConfigError(
            f"commit {result['commit']}, short: {result['short']}; only a full run of a clean "
            "commit is published"
        )
    folder, stem = docs / FOLDER, slug(result)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{stem}-*.svg"):
        old.unlink()
    last = folder / f"{stem}.json"
    if last.is_file():
        result = joined(read_json(last), result)
    replace_file(last, (json.dumps(result, indent=1) + "\n").encode())
    write_charts(result, folder, stem)
    return rewrite(docs)
