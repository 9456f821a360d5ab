"""The four kinds of panels that SafeGene's dashboards are made of, and the frame around them.

A panel is a title, what it tells, and queries with their legends; looks are decided here, once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

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
RATES = "percentunit"

Steps = Sequence[tuple[float | None, str]]
"""From which value on which color; the first value is None."""

RED_FROM_ONE: Steps = ((None, "green"), (1, "red"))


def _ask(ref: str, expr: str, legend: str, *, instant: bool, as_table: bool = False) -> Any:
    asked = prometheus.Dataquery().ref_id(ref).expr(expr).legend_format(legend).datasource(SOURCE)
    if as_table:
        asked = asked.format(query.PromQueryFormat.TABLE)
    return asked.instant() if instant else asked.range()


def _refs(queries: Mapping[str, str]) -> list[tuple[str, str, str]]:
    return [(chr(ord("A") + at), expr, legend) for at, (legend, expr) in enumerate(queries.items())]


def _steps(steps: Steps) -> Any:
    made = [board.Threshold(value=value, color=color) for value, color in steps]
    return dashboard.ThresholdsConfig().mode(board.ThresholdsMode.ABSOLUTE).steps(made)


def number(
    title: str,
    about: str,
    expr: str,
    *,
    unit: str = "short",
    steps: Steps = ((None, "blue"),),
    legend: str = "",
    width: int = 4,
) -> stat.Panel:
    """The latest value, in the color of its step; with a legend, that label in place of it."""
    panel = (
        stat.Panel()
        .title(title)
        .description(about)
        .datasource(SOURCE)
        .with_target(_ask("A", expr, legend, instant=True))
        .unit(unit)
        .thresholds(_steps(steps))
        .color_mode(shapes.BigValueColorMode.VALUE)
        .graph_mode(shapes.BigValueGraphMode.NONE)
        .no_value("none")
        .height(4)
        .span(width)
    )
    return panel.text_mode(shapes.BigValueTextMode.NAME) if legend else panel


def lines(
    title: str,
    about: str,
    queries: Mapping[str, str],
    *,
    unit: str = "short",
    top: float | None = None,
    stacked: bool = False,
    width: int = 12,
) -> timeseries.Panel:
    """One line per series of `queries`: legend -> expression. Thresholds are dashed and red."""
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
        panel = panel.with_target(_ask(ref, expr, legend, instant=False))
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


def rows(
    title: str,
    about: str,
    queries: Mapping[str, str],
    *,
    units: Mapping[str, str] | None = None,
    height: int = 9,
) -> table.Panel:
    """A row per set of labels; each query gives the column named by its key."""
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
        panel = panel.with_target(_ask(ref, expr, column, instant=True, as_table=True))
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


def row(
    made: dashboard.Dashboard, title: str, *panels: stat.Panel | table.Panel | timeseries.Panel
) -> dashboard.Dashboard:
    """`made` with a heading and its panels, from left to right."""
    made = made.with_row(dashboard.Row(title))
    for panel in panels:
        made = made.with_panel(panel)
    return made


def choice(name: str, label: str, metric: str, *, one: bool = False) -> dashboard.QueryVariable:
    """A variable with the values of the label `name` of `metric`, which may name variables."""
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


def frame(
    uid: str, title: str, about: str, variables: Sequence[dashboard.QueryVariable]
) -> dashboard.Dashboard:
    """An empty dashboard with its variables and links to its sisters."""
    made = (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(about)
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
    for variable in variables:
        made = made.with_variable(variable)
    return made


def to_json(made: dashboard.Dashboard) -> str:
    """As it is checked in: sorted, so that a change shows as the lines it concerns."""
    built = made.build()
    for at, panel in enumerate(built.panels or []):
        panel.id_val = at + 1
    return json.dumps(built, cls=JSONEncoder, indent=1, sort_keys=True) + "\n"
