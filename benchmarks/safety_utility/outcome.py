"""What the benchmark found: the table, its markdown, the plots and the numbers of the JSON line.

Reads evaluations, one per tenant, whose states are the methods' titles. Measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from panels import draw_panels
from questions import ATTACK, ORDINARY, OVER_REFUSAL
from repairs import NO_REPAIR, OURS
from safegene_vllm.evaluation.results import Evaluation, TargetResult
from safegene_vllm.evaluation.statistics import Rate
from safegene_vllm.evaluation.targets import AFTER, BEFORE, PARENT
from safegene_vllm.formats.file_io import replace_file
from safegene_vllm.report.figure import save
from safegene_vllm.report.plots import Point

OPENING, STRINGS, COHERENCE = "strings:opening", "strings:advbench", "coherence"
JUDGES = (STRINGS, OPENING, COHERENCE)
TITLES = {BEFORE: NO_REPAIR, AFTER: OURS, PARENT: "the parent itself"}
MEAN = "mean"


@dataclass(frozen=True)
class Column:
    """One measure: how it is called, its key in the JSON line, and whether less is better."""

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
    """For people, in per cent; 95 % intervals in brackets."""
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
    """The same as markdown: the means, each tenant, and the settings that were chosen."""
    heading = ("method", *(f"{c.title} {'↓' if c.less else '↑'}" for c in COLUMNS))
    parts: list[str] = []
    if len(rows) > 1:
        cells = [
            (title, *(f"{100 * values[c.key]:.1f}" for c in COLUMNS))
            for title, values in means(rows).items()
        ]
        parts += [f"Mean over {len(rows)} tenants, per cent:", "", *_lines(heading, cells), ""]
    for tenant, found in rows.items():
        cells = [(t, *(_cell(rates[c.key]) for c in COLUMNS)) for t, rates in found.items()]
        parts += [f"`{tenant}`, per cent with 95 % intervals:", "", *_lines(heading, cells), ""]
    taken = [
        (tenant, title, _settings(notes["chosen"]), "kept" if notes["within_limits"] else "broken")
        for tenant, by_title in chosen.items()
        for title, notes in by_title.items()
    ]
    if taken:
        top = ("tenant", "method", "settings", "limits")
        parts += ["Settings chosen on the training split, by one rule for all:", ""]
        parts += [*_lines(top, taken), ""]
    return "\n".join(parts)


def _lines(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [_row(heading), _row(["---"] * len(heading)), *(_row(cells) for cells in rows)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


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
    """For the JSON line: rate, low, high and n per tenant, method and measure; and the means."""

    def told(rate: Rate) -> dict[str, float]:
        return {
            "rate": round(rate.rate, 4),
            "low": round(rate.low, 4),
            "high": round(rate.high, 4),
            "n": rate.n,
        }

    return {
        "tenants": {
            tenant: {
                title: {key: told(rate) for key, rate in cells.items()}
                for title, cells in found.items()
            }
            for tenant, found in rows.items()
        },
        "mean": {
            title: {key: round(value, 4) for key, value in values.items()}
            for title, values in means(rows).items()
        },
    }
