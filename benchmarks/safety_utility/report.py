"""Results of the benchmark: table, markdown, plot and the numbers of the JSON line.

Reads evaluations, one per tenant, whose states are the methods' titles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich.table import Table

from benchmarks.results import markdown as markdown_table
from benchmarks.safety_utility.methods import METHODS, NO_REPAIR, OURS
from benchmarks.safety_utility.prompts import ATTACK, ORDINARY, OVER_REFUSAL
from safegene_vllm.evaluation.results import Evaluation, TargetResult
from safegene_vllm.evaluation.statistics import Rate
from safegene_vllm.evaluation.targets import AFTER, BEFORE, PARENT
from safegene_vllm.formats.file_io import replace_file
from safegene_vllm.report.figure import AFTER as AFTER_COLOR
from safegene_vllm.report.figure import BEFORE as BEFORE_COLOR
from safegene_vllm.report.figure import GRID, INK, WIDTH_IN, drawing, label, save
from safegene_vllm.report.plots import Point

OPENING, STRINGS, COHERENCE = "strings:opening", "strings:advbench", "coherence"
JUDGES = (STRINGS, OPENING, COHERENCE)
TITLES = {BEFORE: NO_REPAIR, AFTER: OURS, PARENT: "the parent itself"}
MEAN = "mean"


@dataclass(frozen=True)
class Column:
    """One measure: title, key in the JSON line, and whether less is better."""

    title: str
    key: str
    less: bool


COLUMNS = (
    Column("attack success (opening)", "attack_success_opening", True),
    Column("attack success (AdvBench strings)", "attack_success_advbench", True),
    Column("XSTest safe refused", "xstest_safe_refused", True),
    Column("ordinary refused", "ordinary_refused", True),
    Column("coherent on attacks", "coherent_on_attacks", False),
    Column("task right", "task_accuracy", False),
)

Rows = dict[str, dict[str, dict[str, Rate]]]
"""By tenant, method's title and column's key."""


def state_of(title: str) -> str:
    """The state under which a method's subject is evaluated."""
    return next((state for state, known in TITLES.items() if known == title), title)


def title_of(state: str) -> str:
    return TITLES.get(state, state)


def measures(result: TargetResult) -> dict[str, Rate]:
    """The columns of one subject; its only task is the tenant's own."""
    attack, safe = result.rates[ATTACK], result.rates[OVER_REFUSAL]
    found = (
        attack[OPENING],
        attack[STRINGS],
        safe[OPENING],
        result.rates[ORDINARY][OPENING],
        attack[COHERENCE],
        next(iter(result.accuracy.values())),
    )
    return {column.key: rate for column, rate in zip(COLUMNS, found, strict=True)}


def rows_of(evaluations: Mapping[str, Evaluation]) -> Rows:
    """Every tenant's subjects, the parent among them, in the order of the evaluation."""
    return {
        tenant: {title_of(subject.state): measures(subject) for subject in evaluation.targets}
        for tenant, evaluation in evaluations.items()
    }


def means(rows: Rows) -> dict[str, dict[str, float]]:
    """Each method's plain mean over the tenants, where all tenants have it."""
    titles = [
        title
        for title in dict.fromkeys(t for found in rows.values() for t in found)
        if all(title in found for found in rows.values())
    ]
    return {
        title: {
            column.key: fmean(found[title][column.key].rate for found in rows.values())
            for column in COLUMNS
        }
        for title in titles
    }


def _cell(rate: Rate) -> str:
    return f"{100 * rate.rate:.1f} ({100 * rate.low:.0f} to {100 * rate.high:.0f})"


def table(rows: Rows) -> Table:
    """Rates in per cent, 95 % intervals in brackets."""
    headings = [f"{c.title} {'↓' if c.less else '↑'}" for c in COLUMNS]
    made = Table("tenant", "method", *headings, title="per cent, 95 % interval in brackets")
    for tenant, found in rows.items():
        for title, cells in found.items():
            made.add_row(tenant, title, *(_cell(cells[c.key]) for c in COLUMNS))
        made.add_section()
    for title, values in means(rows).items() if len(rows) > 1 else ():
        made.add_row(MEAN, title, *(f"{100 * values[c.key]:.1f}" for c in COLUMNS))
    return made


def markdown(rows: Rows, chosen: Mapping[str, Mapping[str, Any]]) -> str:
    """Means, each tenant, and the chosen settings as markdown."""
    heading = ("method", *(f"{c.title} {'↓' if c.less else '↑'}" for c in COLUMNS))
    parts: list[str] = []
    if len(rows) > 1:
        cells = [
            (title, *(f"{100 * values[c.key]:.1f}" for c in COLUMNS))
            for title, values in means(rows).items()
        ]
        parts += [
            f"Mean over {len(rows)} tenants, per cent:",
            "",
            *markdown_table((heading, cells)),
            "",
        ]
    for tenant, found in rows.items():
        cells = [(t, *(_cell(rates[c.key]) for c in COLUMNS)) for t, rates in found.items()]
        parts += [
            f"`{tenant}`, per cent with 95 % intervals:",
            "",
            *markdown_table((heading, cells)),
            "",
        ]
    taken = [
        (
            tenant,
            title,
            _settings(notes["chosen"]),
            "within" if notes["within_limits"] else "exceeded",
        )
        for tenant, by_title in chosen.items()
        for title, notes in by_title.items()
    ]
    if taken:
        top = ("tenant", "method", "settings", "limits")
        parts += ["Settings chosen on the training split, by one rule for all:", ""]
        parts += [*markdown_table((top, taken)), ""]
    return "\n".join(parts)


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {'own' if v is None else v}" for k, v in settings.items())


def write_plot(rows: Rows, folder: Path) -> list[Path]:
    """`safety_utility.svg` and `.png`: x task accuracy, y attack success, a panel per tenant."""
    points = [
        Point(tenant, title, cells["task_accuracy"], cells["attack_success_opening"])
        for tenant, found in rows.items()
        for title, cells in found.items()
        if title != TITLES[PARENT]
    ]
    parents = {
        tenant: found[TITLES[PARENT]]["attack_success_opening"] for tenant, found in rows.items()
    }
    figure = draw_panels(points, parents)
    written = [folder / f"safety_utility.{ending}" for ending in ("svg", "png")]
    for path in written:
        save(figure, path)
    return written


def write_markdown(rows: Rows, chosen: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    replace_file(path, markdown(rows, chosen).encode())


def numbers(rows: Rows) -> dict[str, Any]:
    """Rates per tenant, method and measure, and the means, for the JSON line."""

    def numbers_of(rate: Rate) -> dict[str, float]:
        return {
            "rate": round(rate.rate, 4),
            "low": round(rate.low, 4),
            "high": round(rate.high, 4),
            "n": rate.n,
        }

    return {
        "tenants": {
            tenant: {
                title: {key: numbers_of(rate) for key, rate in cells.items()}
                for title, cells in found.items()
            }
            for tenant, found in rows.items()
        },
        "mean": {
            title: {key: round(value, 4) for key, value in values.items()}
            for title, values in means(rows).items()
        },
    }


PANEL_IN = 2.5
ROOM = 0.03

_COLORS = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#5b626b", "#332288")
_MARKERS = ("s", "^", "v", "P", "X", "*", "D")


def looks() -> dict[str, tuple[str, str]]:
    """Color and marker of every method by title, independent of the methods that run."""
    others = [m.title for m in METHODS.values() if m.title not in (NO_REPAIR, OURS)]
    every = {NO_REPAIR: (BEFORE_COLOR, "o"), OURS: (AFTER_COLOR, "o")}
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
