"""Pictures of panels, drawn by matplotlib from a live Prometheus and the dashboards' queries.

    python -m deploy.grafana.pictures --prometheus http://127.0.0.1:9090 --minutes 10 \
        --tenant acme/support --out docs/dashboards

For the docs and for places without a Grafana; the layout is not Grafana's.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from deploy.grafana.build import FOLDER
from deploy.prometheus.expressions import filled
from deploy.prometheus.stack import Stack, StackError

PICTURES: dict[str, tuple[str, tuple[str, ...]]] = {
    "safety": ("fleet", ("Gain norm", "Mean coefficient", "Sites of the vector", "Lag")),
    "traffic": ("fleet", ("Requests", "Rejected requests", "Refusals in answers", "Jobs")),
    "tenant": ("tenant", ("Coefficients", "Tokens per second", "Time to first token", "Requests")),
    "engine": ("engine", ("Slots", "Memory", "Requests in the engine", "A scrape takes")),
    "probes": ("tenant", ("Attack success", "Over-refusal", "Coherent answers", "Probe runs")),
}
"""File -> dashboard and the panels on the picture, each a line chart."""
STEPS = 120
WORDS = {"s": "s", "reqps": "per s", "bytes": "MB"}


class PictureError(ValueError):
    """A missing panel, or a picture without any data."""


def panel_of(board: str, title: str) -> dict[str, Any]:
    """Raises: PictureError."""
    panels: list[dict[str, Any]] = json.loads((FOLDER / f"{board}.json").read_text())["panels"]
    for panel in panels:
        if panel["title"] == title and panel["type"] == "timeseries":
            return panel
    raise PictureError(f"no line chart {title!r} on {board}.json; see its titles")


def draw(axes: Axes, stack: Stack, panel: dict[str, Any], tenant: str, minutes: float) -> int:
    """Draw one panel; return the number of series with data.

    Raises: StackError.
    """
    end = time.time()
    step_s = 60 * minutes / STEPS
    count = 0
    for target in panel["targets"]:
        expr = filled(target["expr"], tenant=tenant)
        threshold = expr.startswith("safegene:threshold:")
        series = stack.history(expr, end - 60 * minutes, end, step_s)
        count += 0 if threshold else len(series)
        for one in series:
            at, values = with_gaps(one["values"], step_s)
            minutes_ago = [(timestamp - end) / 60 for timestamp in at]
            label = _legend(target, one["metric"])
            # Not clipped and above the frame: 0 and 100 % lie on it.
            (drawn,) = axes.plot(
                minutes_ago, values, label=label, linewidth=1.2, clip_on=False, zorder=3
            )
            if threshold:
                drawn.set(color="red", linestyle="--")
    defaults = panel["fieldConfig"]["defaults"]
    unit = defaults.get("unit", "")
    if unit == "percentunit":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    elif unit == "bytes":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e6:g}"))
    axes.set_title(panel["title"], fontsize=9, loc="left")
    axes.set_ylabel(WORDS.get(unit, ""), fontsize=8)
    axes.set_ylim(0, defaults.get("max"))
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    if 0 < len(axes.get_lines()) <= 10:
        axes.legend(fontsize=6, loc="best")
    return count


def with_gaps(
    values: Sequence[tuple[float, str]], step_s: float
) -> tuple[list[float], list[float]]:
    """Times and values of a series, with a NaN in each gap, where no line is drawn."""
    at: list[float] = []
    found: list[float] = []
    for timestamp, value in values:
        if at and timestamp - at[-1] > 1.5 * step_s:
            at.append(timestamp - step_s)
            found.append(math.nan)
        at.append(timestamp)
        found.append(float(value))
    return at, found


def _legend(target: dict[str, Any], labels: dict[str, str]) -> str:
    """Grafana's legend, such as `{{tenant}}`, with the labels of a series."""
    words: str = target["legendFormat"]
    for label in re.findall(r"\{\{(\w+)\}\}", words):
        words = words.replace(f"{{{{{label}}}}}", labels.get(label) or "none")
    return words


def picture(name: str, stack: Stack, tenant: str, minutes: float, folder: Path) -> Path:
    """`name`.png in `folder`. Raises: PictureError, StackError."""
    board, titles = PICTURES[name]
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    places = figure.subplots(2, 2).flat
    drawn = 0
    for axes, title in zip(places, titles, strict=True):
        drawn += draw(axes, stack, panel_of(board, title), tenant, minutes)
    if not drawn:
        raise PictureError(f"{name}: none of {', '.join(titles)} has data at {stack.url}")
    figure.supxlabel("minutes ago", fontsize=8)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=90, metadata={"Software": None})
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.grafana.pictures", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--prometheus", required=True, help="its address")
    parser.add_argument("--minutes", type=float, default=10, help="how far back (10)")
    parser.add_argument("--tenant", required=True, help="tenant of the tenant dashboard")
    parser.add_argument("--out", type=Path, default=Path("docs/dashboards"))
    parser.add_argument("names", nargs="*", help="which (all)")
    given = parser.parse_args(arguments)
    unknown = sorted(set(given.names) - set(PICTURES))
    if unknown:
        parser.error(f"no picture {', '.join(unknown)}; there are {', '.join(PICTURES)}")
    stack = Stack(given.prometheus.rstrip("/"))
    try:
        for name in given.names or PICTURES:
            print(picture(name, stack, given.tenant, given.minutes, given.out))
    except (StackError, PictureError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
