"""The result for people: rows of text for a cell, the aims and the predictions, as tables.

One set of rows for the terminal and for markdown. Reads the result as gathering made it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from ratios import BETWEEN, DECODE_STEP, FIRST, PROMPT_TOKEN, SPEED

Rows = tuple[tuple[str, ...], list[tuple[str, ...]]]
"""Heading and rows."""
NONE = "–"
MIB = 1 << 20


@dataclass(frozen=True)
class Column:
    """One number of an arm: where it is in the result, how it is called, by what it is divided."""

    title: str
    part: str
    metric: str
    form: str = "{:.1f}"
    unit: float = 1.0


COLUMNS = (
    Column("output tok/s", "rounds", SPEED),
    Column("first token p50 ms", "rounds", FIRST, "{:.0f}"),
    Column("p99", "rounds", "ttft_p99_ms", "{:.0f}"),
    Column("between tokens p50 ms", "rounds", BETWEEN),
    Column("p99", "rounds", "itl_p99_ms", "{:.0f}"),
    Column("decode step ms", "rounds", DECODE_STEP),
    Column("prompt token µs", "rounds", PROMPT_TOKEN, "{:.0f}"),
    Column("RSS MiB", "after", "rss_bytes", "{:.0f}", MIB),
    Column("peak MiB", "after", "peak_bytes", "{:.0f}", MIB),
    Column("vector MiB", "after", "vector_bytes", "{:.2f}", MIB),
    Column("slots MiB", "after", "slot_bytes", "{:.1f}", MIB),
    Column("start s", "starts", "start_s"),
    Column("weights s", "starts", "load_weights_s", "{:.2f}"),
    Column("load s", "after", "load_s", "{:.3f}"),
    Column("change s", "after", "change_s", "{:.3f}"),
)


def number(value: Any, form: str = "{:.3g}", unit: float = 1.0) -> str:
    """One number, or the median of a spread; a dash where there is none."""
    if isinstance(value, Mapping):
        value = value["median"]
    return NONE if value is None else form.format(value / unit)


def spread_text(found: Mapping[str, float] | None) -> str:
    """`0.98 (0.95 to 1.01)`; a dash where nothing was measured."""
    if found is None:
        return NONE
    return f"{found['median']:.3f} ({found['min']:.3f} to {found['max']:.3f})"


def arm_rows(result: Mapping[str, Any], cell: str) -> Rows:
    """A row per arm with its numbers; columns that no arm has are left out."""
    arms = result["cells"][cell]["arms"]
    used = [c for c in COLUMNS if any(c.metric in found[c.part] for found in arms.values())]
    rows = [
        (found["title"], *(number(found[c.part].get(c.metric), c.form, c.unit) for c in used))
        for found in arms.values()
    ]
    return ("arm", *(c.title for c in used)), rows


def ratio_rows(result: Mapping[str, Any], cell: str) -> Rows:
    """A row per comparison in the cell: speed, first token, between tokens."""
    arms = {name: found["title"] for name, found in result["cells"][cell]["arms"].items()}
    pairs = dict.fromkeys(
        name.split(".")[1] for name in result["ratios"] if name.split(".")[0] == cell
    )
    heading = {SPEED: "output tok/s", FIRST: "first token p50", BETWEEN: "between tokens p50"}
    if any(f"{cell}.{pair}.{DECODE_STEP}" in result["ratios"] for pair in pairs):
        heading |= {DECODE_STEP: "decode step", PROMPT_TOKEN: "prompt token"}
    rows = []
    for pair in pairs:
        arm, _, other = pair.partition("_over_")
        cells = [spread_text(result["ratios"].get(f"{cell}.{pair}.{metric}")) for metric in heading]
        rows.append((f"{arms[arm]} / {arms[other]}", *cells))
    return ("ratio", *heading.values()), rows


def aim_rows(result: Mapping[str, Any]) -> Rows:
    """A row per aim: the bound, what was found, and the verdict in words."""
    words = {True: "met", False: "missed", None: "not measured"}
    rows: list[tuple[str, ...]] = [
        (aim["what"], aim["bound"], spread_text(aim["found"]), words[aim["met"]])
        for aim in result["aims"]
    ]
    return ("aim", "bound", "found", "verdict"), rows


def predicted_rows(result: Mapping[str, Any]) -> Rows:
    """A row per ratio that a roofline says something about, beside what was measured."""
    rows: list[tuple[str, ...]] = [
        (f"`{name}`", f"{expected:.3f}", spread_text(result["ratios"][name]))
        for name, expected in result["predicted"].items()
    ]
    return ("ratio", "predicted", "measured"), rows


def settings_text(result: Mapping[str, Any], cell: str) -> str:
    """The cell's settings as one sentence."""
    told = result["cells"][cell]
    settings, load = told["settings"], told["settings"]["load"]
    mode = "compiled" if settings["compiled"] else "eager"
    return (
        f"{settings['tenants']} tenants of rank {settings['rank']}, vector of rank "
        f"{settings['vector_rank']}, {mode}; {load['requests']} requests of "
        f"{load['prompt_tokens']} + {load['output_tokens']} tokens, {load['concurrency']} at a "
        f"time; {told['rounds']} rounds, commit `{told['commit']}`"
    )


def table(rows: Rows, title: str) -> Table:
    """For a terminal."""
    heading, lines = rows
    made = Table(*heading, title=title)
    for line in lines:
        made.add_row(*(cell.replace("`", "") for cell in line))
    return made


def markdown(rows: Rows) -> list[str]:
    """The same as lines of markdown."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    heading, lines = rows
    return [line(heading), line(["---"] * len(heading)), *map(line, lines)]
