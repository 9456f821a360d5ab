"""The benchmark's figures: a step by tenants in it, slots against waiting, and what is used up.

In the style of the report's plots. Knows numbers, not how they were found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from fleet import Limit
from safegene_vllm.report.figure import AFTER, BEFORE, GRID, INK, QUIET, drawing, new_figure

_plain = FuncFormatter(lambda value, _: f"{value:g}")
_COLORS = (AFTER, BEFORE, "#009e73", "#cc79a7", QUIET)


@drawing
def draw_lines(
    lines: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str, *, log: bool = False
) -> Figure:
    """One line per name over doubling x; `log`: y by powers of ten."""
    figure, axes = new_figure(3.2)
    for (name, points), color in zip(lines.items(), _COLORS, strict=False):
        axes.plot(
            [p[0] for p in points],
            [p[1] for p in points],
            color=color,
            marker="o",
            ms=3,
            label=name,
        )
    ticks = sorted({p[0] for points in lines.values() for p in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_plain)
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color=GRID, linewidth=0.6)
    figure.legend(loc="outside upper left", ncols=2)
    return figure


@drawing
def draw_limits(limits: Sequence[Limit]) -> Figure:
    """A bar per part, the share that is used, by powers of ten; the line is all of it."""
    figure, axes = new_figure(0.8 + 0.3 * len(limits))
    ordered = sorted(limits, key=lambda limit: limit.used)
    colors = [BEFORE if limit.used > 1 else AFTER for limit in ordered]
    axes.barh([limit.part for limit in ordered], [limit.used for limit in ordered], color=colors)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(_plain)
    axes.axvline(1.0, color=INK, linewidth=0.8)
    axes.set_xlabel("used, as a multiple of what there is")
    return figure
