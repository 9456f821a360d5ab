"""The plots of the benchmark: every ratio of a cell with its spread, and each axis as a line.

In the style of the report's plots. Reads the result as gathering made it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import FixedLocator, NullLocator

from ratios import SPEED
from safegene_vllm.report.figure import (
    AFTER,
    BEFORE,
    GRID,
    INK,
    Figure,
    drawing,
    label,
    new_figure,
    save,
)

AXES = {"tenants": "tenants", "rank": "rank of the tenants' adapters", "concurrency": "in flight"}
"""Groups of cells that are points on one axis, and the axis' name."""
WHOLE = ("main", "paired", "by_hand", "by_hand_large", "checkpoint", "layers", "profiles")
"""Cells with a plot of their own."""
_CENTER = {"tenants": ("tenants",), "rank": ("rank",), "concurrency": ("load", "concurrency")}
_COLORS = (AFTER, BEFORE, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", INK)
_MARKERS = ("o", "s", "^", "v", "P", "X", "D", "*")
_ROW_IN = 0.3


@drawing
def draw_ratios(result: Mapping[str, Any], cell: str, metric: str = SPEED) -> Figure:
    """A line per comparison of the cell: its median, the least and the greatest; 1 is equal."""
    lines = []
    for name, found in result["ratios"].items():
        where, lora, what = name.split(".")
        if where == cell and what == metric:
            lines.append((label(lora.replace("_over_", " / ")), found))
    figure, axes = new_figure(_ROW_IN * len(lines) + 0.9)
    axes.axvline(1.0, color=INK, linewidth=1.0)
    for place, (_, found) in enumerate(lines):
        axes.plot([found["min"], found["max"]], [place, place], color=AFTER, linewidth=1.4)
        axes.plot([found["median"]], [place], "o", color=AFTER, markersize=5)
    axes.set_yticks(range(len(lines)), [name for name, _ in lines])
    axes.set(ylim=(len(lines) - 0.4, -0.6), xlabel=f"ratio of {metric}")
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    return figure


def axis_points(result: Mapping[str, Any], group: str) -> list[tuple[int, str]]:
    """(value, cell) along one axis, the center among them."""
    found = []
    for cell, told in result["cells"].items():
        if cell == "main":
            value: Any = told["settings"]
            for key in _CENTER[group]:
                value = value[key]
            found.append((int(value), cell))
        elif match := re.fullmatch(rf"{group}_(\d+)", cell):
            found.append((int(match[1]), cell))
    return sorted(found)


@drawing
def draw_axis(result: Mapping[str, Any], group: str) -> Figure:
    """Output tokens per second of every arm along one axis, medians with their range."""
    points = axis_points(result, group)
    by_arm: dict[str, list[tuple[int, Mapping[str, float], str]]] = {}
    inside = {arm for _, cell in points if cell != "main" for arm in result["cells"][cell]["arms"]}
    for value, cell in points:
        for arm, found in result["cells"][cell]["arms"].items():
            if arm in inside and SPEED in found["rounds"]:
                by_arm.setdefault(arm, []).append((value, found["rounds"][SPEED], found["title"]))
    figure, axes = new_figure(2.9)
    for k, line in enumerate(by_arm.values()):
        look: dict[str, Any] = {
            "color": _COLORS[k % len(_COLORS)],
            "marker": _MARKERS[k % len(_MARKERS)],
        }
        xs = [value for value, _, _ in line]
        axes.plot(xs, [f["median"] for _, f, _ in line], label=line[0][2], markersize=5, **look)
        for x, found, _ in line:
            axes.plot([x, x], [found["min"], found["max"]], color=look["color"], linewidth=1.0)
    axes.set_xscale("log", base=2)
    values = [value for value, _ in points]
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(values, [str(value) for value in values])
    axes.set(xlabel=AXES[group], ylabel="output tokens per second")
    axes.set_ylim(0, 1.06 * max(f["max"] for line in by_arm.values() for _, f, _ in line))
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    figure.legend(loc="outside upper left", ncols=1)
    return figure


def write_charts(result: Mapping[str, Any], folder: Path, stem: str) -> list[Path]:
    """SVG files for every cell with ratios, and every axis with two points; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Figure] = {}
    for cell in _with_ratios(result):
        if cell in WHOLE:
            figures[cell] = draw_ratios(result, cell)
    for group in AXES:
        if len(axis_points(result, group)) > 1:
            figures[f"axis_{group}"] = draw_axis(result, group)
    written = []
    for name, figure in figures.items():
        written.append(folder / f"{stem}-{name}.svg")
        save(figure, written[-1])
    return written


def _with_ratios(result: Mapping[str, Any]) -> Sequence[str]:
    named = {name.split(".")[0] for name in result["ratios"] if name.endswith(f".{SPEED}")}
    return [cell for cell in result["cells"] if cell in named]
