"""The benchmark's figure: a panel per tenant, a mark per method, x task accuracy, y attack success.

In the style of the report's plots. Knows points, not evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from repairs import METHODS, NO_REPAIR, OURS
from safegene_vllm.evaluation.statistics import Rate
from safegene_vllm.report.figure import AFTER, BEFORE, GRID, INK, WIDTH_IN, drawing, label
from safegene_vllm.report.plots import Point

PANEL_IN = 2.5
ROOM = 0.03

_COLORS = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#5b626b", "#332288")
_MARKERS = ("s", "^", "v", "P", "X", "*", "D")


def looks() -> dict[str, tuple[str, str]]:
    """Every method's color and marker, by title; the same whichever methods are run."""
    others = [m.title for m in METHODS.values() if m.title not in (NO_REPAIR, OURS)]
    every = {NO_REPAIR: (BEFORE, "o"), OURS: (AFTER, "o")}
    return every | dict(zip(others, zip(_COLORS, _MARKERS, strict=True), strict=True))


@drawing
def draw_panels(points: Sequence[Point], parents: Mapping[str, Rate]) -> Figure:
    """Right is more useful, down is safer; thin lines are 95 % intervals.

    A point's state is its method's title. `parents`: per tenant the parent's attack success, a
    dashed line.
    """
    tenants = list(dict.fromkeys(point.tenant for point in points))
    columns = min(2, len(tenants))
    rows = math.ceil(len(tenants) / columns)
    figure = Figure(
        figsize=(WIDTH_IN * (1.0 if columns == 1 else 1.44), PANEL_IN * rows + 0.5),
        layout="constrained",
    )
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    look = looks()
    handles = {}
    for tenant, axes in zip(tenants, panels.flat, strict=False):
        own = [point for point in points if point.tenant == tenant]
        for point in own:
            color, marker = look[point.state]
            x, y = point.accuracy, point.attack
            faint = {"color": color, "linewidth": 0.9, "alpha": 0.55, "zorder": 1}
            axes.plot([x.low, x.high], [y.rate, y.rate], **faint)
            axes.plot([x.rate, x.rate], [y.low, y.high], **faint)
            (handle,) = axes.plot([x.rate], [y.rate], marker, color=color, markersize=5.5, zorder=3)
            handles[point.state] = handle
        if tenant in parents:
            dashed = {"color": INK, "linestyle": (0, (3, 2)), "linewidth": 1.0, "zorder": 0.5}
            handles["the parent"] = axes.axhline(parents[tenant].rate, **dashed)
        reach = [end for point in own for end in (point.accuracy.low, point.accuracy.high)]
        axes.set(xlim=(min(reach) - ROOM, min(max(reach) + ROOM, 1.02)), ylim=(-0.04, 1.04))
        axes.set_title(label(tenant), fontsize=9, loc="left")
        axes.set_xlabel("task accuracy (further right is better)")
        axes.grid(color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    for axes in panels.flat[len(tenants) :]:
        axes.set_visible(False)
    for axes in panels[:, 0]:
        axes.set_ylabel("attack success (lower is better)")
    order = [title for title in (*look, "the parent") if title in handles]
    figure.legend([handles[title] for title in order], order, loc="outside upper left", ncols=4)
    return figure
