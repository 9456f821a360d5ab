"""Plots of the benchmarks, in the style of the evaluation report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks.results import Spread
from safegene_vllm.report.figure import AFTER, BEFORE, GRID, INK, drawing, label, new_figure

COLORS = (AFTER, BEFORE, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", INK)
MARKERS = ("o", "s", "^", "v", "P", "X", "D", "*")
_PLAIN = FuncFormatter(lambda value, _: f"{value:g}")


@drawing
def draw_lines(
    lines: Mapping[str, Sequence[Sequence[float]]], x: str, y: str, *, log: bool = False
) -> Figure:
    """One line per name over a doubling x.

    Each point is (x, y) or (x, y, min, max). With `log`, y is logarithmic too.
    """
    figure, axes = new_figure(3.0)
    for number, (name, points) in enumerate(lines.items()):
        color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        axes.plot(xs, ys, color=color, marker=marker, markersize=4, label=name)
        for point in points:
            if len(point) == 4:
                axes.plot([point[0]] * 2, point[2:], color=color, linewidth=1.0)
    ticks = sorted({point[0] for points in lines.values() for point in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_PLAIN)
    else:
        axes.set_ylim(bottom=0)
    axes.set(xlabel=x, ylabel=y)
    axes.grid(color=GRID, linewidth=0.6)
    figure.legend(loc="outside upper left", ncols=2)
    return figure


@drawing
def draw_ratios(ratios: Mapping[str, Spread], x: str) -> Figure:
    """One row per ratio: its median and the range over rounds; the line at 1 is equality."""
    figure, axes = new_figure(0.3 * len(ratios) + 0.9)
    axes.axvline(1.0, color=INK, linewidth=1.0)
    for row, found in enumerate(ratios.values()):
        axes.plot([found["min"], found["max"]], [row, row], color=AFTER, linewidth=1.4)
        axes.plot([found["median"]], [row], "o", color=AFTER, markersize=5)
    axes.set_yticks(range(len(ratios)), [label(name) for name in ratios])
    axes.set(ylim=(len(ratios) - 0.4, -0.6), xlabel=x)
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    return figure


@drawing
def draw_shares(shares: Mapping[str, float], x: str) -> Figure:
    """One bar per name on a logarithmic axis; the line at 1 is the limit."""
    figure, axes = new_figure(0.8 + 0.3 * len(shares))
    ordered = sorted(shares.items(), key=lambda item: item[1])
    colors = [BEFORE if share > 1 else AFTER for _, share in ordered]
    axes.barh([name for name, _ in ordered], [share for _, share in ordered], color=colors)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(_PLAIN)
    axes.axvline(1.0, color=INK, linewidth=0.8)
    axes.set_xlabel(x)
    return figure
