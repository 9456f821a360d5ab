"""Plots of a report as matplotlib figures: `figure.svg` inlines one, `figure.save` writes a file.

Same input, same bytes. Colors are from Okabe and Ito's palette for color-blind readers
(jfly.uni-koeln.de/color).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from safegene_vllm.evaluation.statistics import Rate
from safegene_vllm.report.figure import (
    AFTER,
    BEFORE,
    GRID,
    INK,
    QUIET,
    drawing,
    label,
    new_figure,
    place_labels,
)

STATES = {"before": BEFORE, "after": AFTER, "parent": INK}
_OTHERS = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31")
_MARKERS = ("s", "^", "v", "P", "X")
_BAR_IN = 0.2
_ROW_LETTERS = 66
_Place = tuple[float, float]


@dataclass(frozen=True)
class Bar:
    """One measured rate of one tenant in one state, a share from 0 to 1."""

    tenant: str
    state: str
    rate: Rate


@dataclass(frozen=True)
class Point:
    """One tenant in one state: task accuracy (x) and attack success (y), shares from 0 to 1."""

    tenant: str
    state: str
    accuracy: Rate
    attack: Rate


def _ordered(states: Collection[str]) -> list[str]:
    """Before, after, the other states in order, and the parent last."""
    others = [state for state in states if state not in STATES]
    return [s for s in ("before", "after", *dict.fromkeys(others), "parent") if s in states]


def _styles(states: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Color and marker by state."""
    styles = {"before": (BEFORE, "o"), "after": (AFTER, "o"), "parent": (INK, "D")}
    others = [state for state in states if state not in styles]
    for number, state in enumerate(others):
        marker = _MARKERS[(number + number // len(_OTHERS)) % len(_MARKERS)]
        styles[state] = (_OTHERS[number % len(_OTHERS)], marker)
    return styles


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _percent_axis(axis: Any, low: float = 0.0, high: float = 1.0) -> None:
    """Ticks at round percentages from `low` to `high` (shares)."""
    step = next((s for s in (2, 5, 10, 20) if (high - low) * 100 / s <= 4.5), 25)
    first, last = math.ceil(low * 100 / step - 1e-9), math.floor(high * 100 / step + 1e-9)
    places = [number * step for number in range(first, last + 1)]
    axis.set_ticks([place / 100 for place in places], [f"{place} %" for place in places])


def _bare(axes: Axes, *spines: str) -> None:
    for name, spine in axes.spines.items():
        spine.set_visible(name in spines)
    axes.tick_params(length=0)
    axes.set_axisbelow(True)


def _legend(figure: Figure, handles: Sequence[Any]) -> None:
    """A legend above the axes, in as many columns as fit; the figure grows by its rows."""
    lengths = [len(handle.get_label()) + 5 for handle in handles] or [1]
    in_one_row = sum(lengths) <= _ROW_LETTERS
    columns = len(lengths) if in_one_row else max(1, _ROW_LETTERS // max(lengths))
    further = math.ceil(len(handles) / columns) - 1
    figure.set_figheight(figure.get_figheight() + 0.18 * max(further, 0))
    figure.legend(handles=handles, loc="outside upper left", ncols=columns)


@drawing
def draw_rates(bars: Sequence[Bar], *, what: str, parent: Rate | None = None) -> Figure:
    """Rates as grouped bars, a group per tenant and a bar per state, with 95 % intervals.

    `parent` is a line with its interval as a band; `what` labels the axis.
    """
    tenants = list(dict.fromkeys(bar.tenant for bar in bars))
    states = _ordered([bar.state for bar in bars])
    styles = _styles(states)
    places: list[float] = []
    ticks: list[float] = []
    ordered: list[Bar] = []
    for tenant in tenants:
        own = sorted((b for b in bars if b.tenant == tenant), key=lambda b: states.index(b.state))
        start = places[-1] + 1.7 if places else 0.0
        places += [start + number for number in range(len(own))]
        ticks.append(start + (len(own) - 1) / 2)
        ordered += own
    rows = (places[-1] if places else 0.0) + 1
    figure, axes = new_figure(rows * _BAR_IN + 0.95)
    for place, bar in zip(places, ordered, strict=True):
        rate, color = bar.rate, styles[bar.state][0]
        axes.barh(place, rate.rate, height=0.84, color=color, linewidth=0)
        axes.plot([rate.low, rate.high], [place, place], color=INK, linewidth=1.1, zorder=4)
        for end in (rate.low, rate.high):
            axes.plot([end, end], [place - 0.2, place + 0.2], color=INK, linewidth=1.1, zorder=4)
        at = max(rate.high, rate.rate) + 0.015
        if parent is not None and at - 0.02 < parent.rate < at + 0.12:
            at = parent.rate + 0.015
        axes.text(at, place, _percent(rate.rate), va="center")
    handles: list[Any] = [
        Rectangle((0, 0), 1, 1, color=styles[s][0], label=label(s, 24), lw=0) for s in states
    ]
    if parent is not None:
        axes.axvspan(parent.low, parent.high, color=INK, alpha=0.14, linewidth=0, zorder=0.5)
        text = f"parent, {_percent(parent.rate)}"
        handles.append(axes.axvline(parent.rate, color=INK, ls=(0, (3, 2)), lw=1.2, label=text))
    axes.set_yticks(ticks, [label(tenant, 20) for tenant in tenants])
    axes.set(xlim=(0, 1.16), ylim=(rows - 0.4, -0.6))
    axes.set_xlabel("\n".join(label(line, 46) for line in what.split("\n")))
    _percent_axis(axes.xaxis)
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    _bare(axes, "left")
    _legend(figure, handles)
    return figure


@drawing
def draw_safety_utility(
    points: Sequence[Point], *, accuracy: str = "task accuracy", attack: str = "attack success"
) -> Figure:
    """Accuracy against attack success: an arrow per tenant from before to after.

    Right is more useful, down is safer. Thin lines are 95 % intervals. A tenant with several tasks
    needs a name for each.
    """
    states = _ordered([point.state for point in points])
    styles = _styles(states)
    figure, axes = new_figure(3.7)
    reach = [end for p in points for end in (p.accuracy.low, p.accuracy.high)] or [0.0, 1.0]
    # At least ten points wide, with room for the labels.
    room = max(0.22 * (max(reach) - min(reach)), (0.1 - (max(reach) - min(reach))) / 2, 0.02)
    low, high = max(min(reach) - room, -0.02), min(max(reach) + room, 1.02)
    axes.set(xlim=(low, high), ylim=(-0.04, 1.04))
    lines: list[tuple[_Place, _Place]] = []
    names: list[tuple[str, list[_Place]]] = []
    for tenant in dict.fromkeys(point.tenant for point in points):
        own = {p.state: (p.accuracy.rate, p.attack.rate) for p in points if p.tenant == tenant}
        if "before" in own and "after" in own:
            lines.append((own["before"], own["after"]))
            ends = {"arrowstyle": "-|>", "color": QUIET, "lw": 1.2, "shrinkA": 4, "shrinkB": 4}
            axes.annotate("", own["after"], own["before"], arrowprops=ends, zorder=2)
        first = own.get("before", next(iter(own.values())))
        for state in (state for state in own if state not in STATES):
            lines.append((first, own[state]))
            axes.plot(*zip(first, own[state], strict=True), ":", color=QUIET, lw=0.8, zorder=1)
        # The name may stand at any of its points; markers tell the states apart.
        names.append((label(tenant, 20), [own[s] for s in ("after", *own) if s in own]))
    for point in points:
        color, marker = styles[point.state]
        x, y = point.accuracy.rate, point.attack.rate
        faint: dict[str, Any] = {"color": color, "linewidth": 0.9, "alpha": 0.55, "zorder": 1}
        sides = ((point.accuracy.low, y), (point.accuracy.high, y))
        heights = ((x, point.attack.low), (x, point.attack.high))
        for line in (sides, heights):
            lines.append(line)
            axes.plot(*zip(*line, strict=True), **faint)
        axes.plot([x], [y], marker, color=color, markersize=5.5, zorder=3)
    axes.set_xlabel(f"{label(accuracy, 34)} (further right is better)")
    axes.set_ylabel(f"{label(attack, 30)} (lower is better)")
    _percent_axis(axes.xaxis, low, high)
    _percent_axis(axes.yaxis)
    axes.grid(color=GRID, linewidth=0.7)
    _bare(axes, "left", "bottom")
    handles = [
        axes.plot([], [], styles[s][1], color=styles[s][0], markersize=5.5, label=label(s, 24))[0]
        for s in states
    ]
    _legend(figure, handles)
    place_labels(figure, axes, names, lines)
    return figure


@drawing
def draw_layer_scores(
    scores: Mapping[int, float], selected: Collection[int], *, what: str = "score"
) -> Figure:
    """A bar per scored layer; layers that carry the vector are filled, others are outlines."""
    figure, axes = new_figure(2.3)
    for layer, score in sorted(scores.items()):
        colors = (AFTER, AFTER) if layer in selected else ("none", QUIET)
        axes.bar(layer, score, width=0.75, color=colors[0], edgecolor=colors[1], linewidth=0.8)
    layers = sorted({*scores, *selected}) or [0]
    axes.set_xlim(layers[0] - 0.7, layers[-1] + 0.7)
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.set_xlabel("layer")
    axes.set_ylabel(label(what, 24))
    axes.axhline(0, color=QUIET, linewidth=0.8)
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    _bare(axes)
    filled = Rectangle((0, 0), 1, 1, color=AFTER, lw=0, label="carries the vector")
    hollow = Rectangle((0, 0), 1, 1, fc="none", ec=QUIET, lw=0.8, label="not selected")
    handles = [filled] if set(scores) <= set(selected) else [filled, hollow]
    _legend(figure, handles)
    return figure


@drawing
def draw_coefficients(by_tenant: Mapping[str, Sequence[float]]) -> Figure:
    """A row per tenant, a cell per layer; the deeper the color, the larger the coefficient.

    Positive ones are blue, negative ones vermilion, a coefficient of 0 is an empty cell. Up to
    twelve layers the cells hold the numbers.
    """
    width = max((len(values) for values in by_tenant.values()), default=1) or 1
    every = [value for values in by_tenant.values() for value in values]
    top = max((abs(value) for value in every), default=0.0) or 1.0
    rows = max(len(by_tenant), 1)
    figure, axes = new_figure(rows * 0.28 + 1.05)
    for row, values in enumerate(by_tenant.values()):
        for layer, value in enumerate(values):
            share = abs(value) / top
            cell = Rectangle((layer - 0.5, row - 0.42), 1, 0.84, lw=0.6, ec=GRID, fc="none")
            axes.add_patch(cell)
            if value != 0.0:
                color = AFTER if value > 0 else BEFORE
                fill = Rectangle((layer - 0.46, row - 0.38), 0.92, 0.76, lw=0, fc=color)
                fill.set_alpha(0.12 + 0.88 * share)
                axes.add_patch(fill)
            if width <= 12:
                on_fill = "#ffffff" if share > 0.5 else INK
                axes.text(layer, row, f"{value:.2g}", ha="center", va="center", color=on_fill)
    axes.set(xlim=(-0.6, width - 0.4), ylim=(rows - 0.45, -0.55))
    axes.set_yticks(range(len(by_tenant)), [label(tenant, 20) for tenant in by_tenant])
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.set_xlabel("layer")
    _bare(axes)
    signs = [1.0] if all(value >= 0 for value in every) else [-1.0, 1.0]
    handles = [
        Rectangle(
            (0, 0),
            1,
            1,
            fc=AFTER if sign > 0 else BEFORE,
            lw=0,
            alpha=0.12 + 0.88 * share,
            label=f"{sign * share * top:.3g}",
        )
        for sign in signs
        for share in ((0.25, 0.5, 1.0) if sign > 0 else (1.0, 0.5))
    ]
    _legend(figure, handles)
    return figure
