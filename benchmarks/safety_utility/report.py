"""Results of the benchmark: tables, plot and the numbers of the JSON line.

Reads evaluations, one per tenant, whose states are the methods' titles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from benchmarks.results import Rows as TableRows
from benchmarks.results import markdown
from benchmarks.safety_utility.methods import METHODS, NO_REPAIR, OURS
from benchmarks.safety_utility.prompts import ATTACK, ORDINARY, OVER_REFUSAL
from safegene_vllm.evaluation.results import Evaluation, TargetResult
from safegene_vllm.evaluation.statistics import Rate
from safegene_vllm.evaluation.targets import AFTER, BEFORE, PARENT
from safegene_vllm.report.figure import AFTER as AFTER_COLOR
from safegene_vllm.report.figure import BEFORE as BEFORE_COLOR
from safegene_vllm.report.figure import GRID, INK, WIDTH_IN, drawing, label, save

OPENING, STRINGS, COHERENCE = "strings:opening", "strings:advbench", "coherence"
JUDGES = (STRINGS, OPENING, COHERENCE)
TITLES = {BEFORE: NO_REPAIR, AFTER: OURS, PARENT: "the parent itself"}

COLUMNS = {
    "attack_success_opening": "attack success (opening) ↓",
    "attack_success_advbench": "attack success (AdvBench strings) ↓",
    "xstest_safe_refused": "XSTest safe refused ↓",
    "ordinary_refused": "ordinary refused ↓",
    "coherent_on_attacks": "coherent on attacks ↑",
    "task_accuracy": "task right ↑",
}
"""Titles by the keys of the JSON line; an arrow shows which way is better."""

Rows = dict[str, dict[str, dict[str, Rate]]]
"""By tenant, method's title and column's key."""


def state_of(title: str) -> str:
    """The state under which a method's target is evaluated."""
    return next((state for state, known in TITLES.items() if known == title), title)


def title_of(state: str) -> str:
    return TITLES.get(state, state)


def measures(result: TargetResult) -> dict[str, Rate]:
    """The columns of one target; its only task is the tenant's own."""
    attack = result.rates[ATTACK]
    found = (
        attack[OPENING],
        attack[STRINGS],
        result.rates[OVER_REFUSAL][OPENING],
        result.rates[ORDINARY][OPENING],
        attack[COHERENCE],
        next(iter(result.accuracy.values())),
    )
    return dict(zip(COLUMNS, found, strict=True))


def rows_of(evaluations: Mapping[str, Evaluation]) -> Rows:
    """Every tenant's targets, the parent among them, in the order of the evaluation."""
    return {
        tenant: {title_of(target.state): measures(target) for target in evaluation.targets}
        for tenant, evaluation in evaluations.items()
    }


def means(rows: Rows) -> dict[str, dict[str, float]]:
    """Each method's plain mean over the tenants, where all tenants have it."""
    titles = dict.fromkeys(title for found in rows.values() for title in found)
    return {
        title: {key: fmean(found[title][key].rate for found in rows.values()) for key in COLUMNS}
        for title in titles
        if all(title in found for found in rows.values())
    }


def tables(rows: Rows, chosen: Mapping[str, Mapping[str, Any]]) -> dict[str, TableRows]:
    """By caption: the means, each tenant, and the chosen settings."""
    heading = ("method", *COLUMNS.values())
    found: dict[str, TableRows] = {}
    if len(rows) > 1:
        cells = [
            (title, *(f"{100 * values[key]:.1f}" for key in COLUMNS))
            for title, values in means(rows).items()
        ]
        found[f"Mean over {len(rows)} tenants, per cent"] = (heading, cells)
    for tenant, by_title in rows.items():
        cells = [
            (title, *(_cell(rates[key]) for key in COLUMNS)) for title, rates in by_title.items()
        ]
        found[f"`{tenant}`, per cent with 95 % intervals"] = (heading, cells)
    taken = [
        (
            tenant,
            title,
            ", ".join(f"{k} {'own' if v is None else v}" for k, v in notes["chosen"].items()),
            "met" if notes["within_limits"] else "exceeded",
        )
        for tenant, by_title in chosen.items()
        for title, notes in by_title.items()
    ]
    if taken:
        top = ("tenant", "method", "settings", "limits")
        found["Settings chosen on the training split, by one rule for all"] = (top, taken)
    return found


def _cell(rate: Rate) -> str:
    return f"{100 * rate.rate:.1f} ({100 * rate.low:.0f} to {100 * rate.high:.0f})"


def as_markdown(captioned: Mapping[str, TableRows]) -> str:
    """The tables with their captions."""
    parts = [f"{text}:\n\n" + "\n".join(markdown(rows)) for text, rows in captioned.items()]
    return "\n\n".join(parts) + "\n"


def numbers(rows: Rows) -> dict[str, Any]:
    """Rates per tenant, method and measure, and the means, for the JSON line."""

    def rounded(values: Mapping[str, float]) -> dict[str, float]:
        return {name: round(value, 4) for name, value in values.items()}

    return {
        "tenants": {
            tenant: {
                title: {key: rounded(vars(rate)) for key, rate in rates.items()}
                for title, rates in found.items()
            }
            for tenant, found in rows.items()
        },
        "mean": {title: rounded(values) for title, values in means(rows).items()},
    }


def write_plot(rows: Rows, folder: Path) -> list[Path]:
    """`safety_utility.svg` and `.png`."""
    figure = draw_panels(rows)
    written = [folder / f"safety_utility.{ending}" for ending in ("svg", "png")]
    for path in written:
        save(figure, path)
    return written


def looks() -> dict[str, tuple[str, str]]:
    """Color and marker of every method by title, independent of the methods that run."""
    colors = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#5b626b", "#332288")
    others = [m.title for m in METHODS.values() if m.title not in (NO_REPAIR, OURS)]
    styles = zip(colors, ("s", "^", "v", "P", "X", "*", "D"), strict=True)
    ours = {NO_REPAIR: (BEFORE_COLOR, "o"), OURS: (AFTER_COLOR, "o")}
    return ours | dict(zip(others, styles, strict=False))


@drawing
def draw_panels(rows: Rows) -> Figure:
    """Task accuracy (x) against attack success (y), a panel per tenant.

    Thin lines are 95 % intervals, the dashed line is the parent's attack success.
    """
    columns = min(2, len(rows))
    lines = math.ceil(len(rows) / columns)
    size = (WIDTH_IN * (1.0 if columns == 1 else 1.44), 2.5 * lines + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False)
    styles, handles = looks(), {}
    for axes, (tenant, found) in zip(panels.flat, rows.items(), strict=False):
        own = {title: rates for title, rates in found.items() if title in styles}
        for title, rates in own.items():
            color, marker = styles[title]
            x, y = rates["task_accuracy"], rates["attack_success_opening"]
            faint = {"color": color, "linewidth": 0.9, "alpha": 0.55, "zorder": 1}
            axes.plot([x.low, x.high], [y.rate, y.rate], **faint)
            axes.plot([x.rate, x.rate], [y.low, y.high], **faint)
            (handle,) = axes.plot([x.rate], [y.rate], marker, color=color, markersize=5.5, zorder=3)
            handles[title] = handle
        parent = found[TITLES[PARENT]]["attack_success_opening"].rate
        dashed = {"color": INK, "linestyle": (0, (3, 2)), "linewidth": 1.0, "zorder": 0.5}
        handles["the parent"] = axes.axhline(parent, **dashed)
        accuracies = [rates["task_accuracy"] for rates in own.values()]
        low, high = min(r.low for r in accuracies), max(r.high for r in accuracies)
        axes.set(xlim=(low - 0.03, min(high + 0.03, 1.02)), ylim=(-0.04, 1.04))
        axes.set_title(label(tenant), fontsize=9, loc="left")
        axes.set_xlabel("task accuracy (further right is better)")
        axes.grid(color=GRID, linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    for axes in panels.flat[len(rows) :]:
        axes.set_visible(False)
    for axes in panels[:, 0]:
        axes.set_ylabel("attack success (lower is better)")
    order = [title for title in (*styles, "the parent") if title in handles]
    figure.legend([handles[title] for title in order], order, loc="outside upper left", ncols=4)
    return figure
