"""Dashboards as code: builds Grafana's JSON from the YAML files in this folder.

    python -m deploy.grafana.build [--check]

A panel in YAML is a title, a description and queries with their legends; the looks are defined
here. With --check nothing is written; it ends with 1 if the JSON differs from the sources.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from grafana_foundation_sdk.builders import (
    common,
    dashboard,
    prometheus,
    stat,
    table,
    timeseries,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as shapes
from grafana_foundation_sdk.models import dashboard as board
from grafana_foundation_sdk.models import prometheus as query

SOURCE = board.DataSourceRef(type_val="prometheus", uid="${datasource}")
PALETTE = board.FieldColorModeId.PALETTE_CLASSIC
FOLDER = Path(__file__).parent / "dashboards"
NAMES = ("fleet", "tenant", "engine")

Steps = Sequence[tuple[float | None, str]]
"""Color from a value on; the first value is None."""


def _query(ref: str, expr: str, legend: str, *, instant: bool, as_table: bool = False) -> Any:
    made = prometheus.Dataquery().ref_id(ref).expr(expr).legend_format(legend).datasource(SOURCE)
    if as_table:
        made = made.format(query.PromQueryFormat.TABLE)
    return made.instant() if instant else made.range()


def _refs(queries: Mapping[str, str]) -> list[tuple[str, str, str]]:
    return [(chr(ord("A") + at), expr, legend) for at, (legend, expr) in enumerate(queries.items())]


def _steps(steps: Steps) -> Any:
    made = [board.Threshold(value=value, color=color) for value, color in steps]
    return dashboard.ThresholdsConfig().mode(board.ThresholdsMode.ABSOLUTE).steps(made)


def stat_panel(
    title: str,
    about: str,
    expr: str,
    *,
    unit: str = "short",
    steps: Steps = ((None, "blue"),),
    legend: str = "",
    width: int = 4,
) -> stat.Panel:
    """The latest value in the color of its step, or with a legend that label."""
    panel = (
        stat.Panel()
        .title(title)
        .description(about)
        .datasource(SOURCE)
        .with_target(_query("A", expr, legend, instant=True))
        .unit(unit)
        .thresholds(_steps(steps))
        .color_mode(shapes.BigValueColorMode.VALUE)
        .graph_mode(shapes.BigValueGraphMode.NONE)
        .no_value("none")
        .height(4)
        .span(width)
    )
    return panel.text_mode(shapes.BigValueTextMode.NAME) if legend else panel


def timeseries_panel(
    title: str,
    about: str,
    queries: Mapping[str, str],
    *,
    unit: str = "short",
    top: float | None = None,
    stacked: bool = False,
    width: int = 12,
) -> timeseries.Panel:
    """One line per series; `queries` are expressions by legend. Thresholds are dashed and red."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(about)
        .datasource(SOURCE)
        .unit(unit)
        .min(0)
        .color_scheme(dashboard.FieldColor().mode(PALETTE))
        .line_width(1)
        .fill_opacity(30 if stacked else 0)
        .show_points(shapes.VisibilityMode.NEVER)
        .tooltip(common.VizTooltipOptions().mode(shapes.TooltipDisplayMode.MULTI))
        .legend(
            common.VizLegendOptions()
            .display_mode(shapes.LegendDisplayMode.LIST)
            .placement(shapes.LegendPlacement.BOTTOM)
            .show_legend(True)
            .calcs([])
        )
        .height(8)
        .span(width)
    )
    if top is not None:
        panel = panel.max(top)
    if stacked:
        panel = panel.stacking(common.StackingConfig().mode(shapes.StackingMode.NORMAL))
    for ref, expr, legend in _refs(queries):
        panel = panel.with_target(_query(ref, expr, legend, instant=False))
        if expr.startswith("safegene:threshold:"):
            panel = panel.override_by_query(
                ref,
                [
                    board.DynamicConfigValue(
                        id_val="color", value={"mode": "fixed", "fixedColor": "red"}
                    ),
                    board.DynamicConfigValue(
                        id_val="custom.lineStyle", value={"fill": "dash", "dash": [8, 8]}
                    ),
                ],
            )
    return panel


def table_panel(
    title: str,
    about: str,
    queries: Mapping[str, str],
    *,
    units: Mapping[str, str] | None = None,
    height: int = 9,
) -> table.Panel:
    """A row per set of labels; `queries` are expressions by column."""
    panel = (
        table.Panel()
        .title(title)
        .description(about)
        .datasource(SOURCE)
        .no_value("none")
        .show_header(True)
        .height(height)
        .span(24)
    )
    named: dict[str, str] = {}
    for ref, expr, column in _refs(queries):
        panel = panel.with_target(_query(ref, expr, column, instant=True, as_table=True))
        named[f"Value #{ref}" if len(queries) > 1 else "Value"] = column
    excluded = dict.fromkeys(("Time", "__name__"), True)
    for kind, options in (
        ("merge", {}),
        ("organize", {"excludeByName": excluded, "renameByName": named}),
    ):
        panel = panel.with_transformation(board.DataTransformerConfig(id_val=kind, options=options))
    for column, unit in (units or {}).items():
        panel = panel.override_by_name(
            column, [board.DynamicConfigValue(id_val="unit", value=unit)]
        )
    return panel


def variable(name: str, label: str, metric: str, *, one: bool = False) -> dashboard.QueryVariable:
    """A variable with the values of the label `name` of `metric`."""
    made = (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query(f"label_values({metric}, {name})")
        .refresh(board.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(board.VariableSort.ALPHABETICAL_ASC)
    )
    if one:
        return made
    every = board.VariableOption(text="All", value="$__all", selected=True)
    return made.multi(True).include_all(True).all_value(".*").current(every)


PANELS: Mapping[str, Any] = {
    "stat": stat_panel,
    "timeseries": timeseries_panel,
    "table": table_panel,
}


def build(source: Mapping[str, Any]) -> str:
    """The JSON of one dashboard, sorted so that a change shows as the lines it concerns."""
    made = (
        dashboard.Dashboard(source["title"])
        .uid(source["uid"])
        .description(source["about"])
        .tags(["safegene"])
        .readonly()
        .refresh("30s")
        .time("now-6h", "now")
        .timezone("browser")
        .tooltip(board.DashboardCursorSync.CROSSHAIR)
        .with_variable(
            dashboard.DatasourceVariable("datasource").label("Source").type("prometheus")
        )
        .link(
            dashboard.DashboardLink("SafeGene")
            .type(board.DashboardLinkType.DASHBOARDS)
            .tags(["safegene"])
            .as_dropdown(False)
            .keep_time(True)
            .include_vars(True)
        )
    )
    for described in source["variables"]:
        made = made.with_variable(variable(**described))
    for row in source["rows"]:
        made = made.with_row(dashboard.Row(row["title"]))
        for panel in row["panels"]:
            arguments = {key: value for key, value in panel.items() if key != "type"}
            made = made.with_panel(PANELS[panel["type"]](**arguments))
    built = made.build()
    for number, panel in enumerate(built.panels or [], start=1):
        panel.id_val = number
    return json.dumps(built, cls=JSONEncoder, indent=1, sort_keys=True) + "\n"


def build_all() -> dict[str, str]:
    """The JSON of every dashboard by file name."""
    here = Path(__file__).parent
    return {f"{n}.json": build(yaml.safe_load((here / f"{n}.yaml").read_text())) for n in NAMES}


def stale() -> list[str]:
    """Files that are missing, differ from their source, or have none."""
    fresh = build_all()
    old = {path.name: path.read_text() for path in FOLDER.glob("*.json")}
    return sorted(name for name in fresh.keys() | old.keys() if fresh.get(name) != old.get(name))


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        print(f"only --check is known, found {' '.join(arguments)!r}", file=sys.stderr)
        return 2
    if arguments:
        for name in stale():
            print(f"{name} is stale: run `python -m deploy.grafana.build`", file=sys.stderr)
        return 1 if stale() else 0
    FOLDER.mkdir(exist_ok=True)
    for name, content in build_all().items():
        (FOLDER / name).write_text(content)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
