"""PromQL expressions of the rules and dashboards, parsed by promql-parser, not evaluated."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import promql_parser
import yaml

RULES = Path(__file__).parent / "rules"
DASHBOARDS = Path(__file__).parents[1] / "grafana" / "dashboards"
OF_PROMETHEUS = frozenset({"ALERTS", "up", "scrape_duration_seconds", "scrape_samples_scraped"})
"""Series of Prometheus itself."""

Kind = Literal["record", "alert", "panel", "variable"]


class ExpressionError(ValueError):
    """An expression that cannot be parsed; the message names the file and the place."""


@dataclass(frozen=True)
class Expression:
    """`text` in `file`; `name` is the record, the alert or the panel's title."""

    file: str
    kind: Kind
    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}: {self.kind} {self.name!r}"


def rules(folder: Path = RULES) -> list[Expression]:
    """Expressions of every *.yml in `folder`."""
    found = []
    for path in sorted(folder.glob("*.yml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            for rule in group["rules"]:
                kind: Kind = "alert" if "alert" in rule else "record"
                found.append(Expression(path.name, kind, rule[kind], rule["expr"].strip()))
    return found


def dashboards(folder: Path = DASHBOARDS) -> list[Expression]:
    """Expressions of every panel and variable of every *.json in `folder`."""
    found = []
    for path in sorted(folder.glob("*.json")):
        board = json.loads(path.read_text())
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                match = re.fullmatch(r"label_values\((.*), \w+\)", variable["query"])
                if match is None:
                    raise ExpressionError(
                        f"{path.name}: variable {variable['name']!r} queries "
                        f"{variable['query']!r}, "
                        "expected label_values(METRIC, LABEL)"
                    )
                found.append(Expression(path.name, "variable", variable["name"], match[1]))
        for panel in board["panels"]:
            for target in panel.get("targets") or ():
                found.append(Expression(path.name, "panel", panel["title"], target["expr"]))
    return found


def filled(text: str, **variables: str) -> str:
    """`text` with Grafana's variables replaced; those not given match everything."""
    values = {"__range": "1h", "__rate_interval": "5m", **variables}
    return re.sub(r"\$(\w+)", lambda found: values.get(found[1], ".*"), text)


def parsed(expression: Expression, **variables: str) -> Any:
    """promql-parser's tree, Grafana's variables filled. Raises: ExpressionError."""
    try:
        return promql_parser.parse(filled(expression.text, **variables))
    except ValueError as error:
        raise ExpressionError(f"{expression}: {error}\n  {expression.text}") from error


def selectors(expression: Expression, **variables: str) -> list[str]:
    """Every vector selector, as text that can be queried: `name{label="value"}`, without offset.

    Raises: ExpressionError for one that cannot be parsed or names no metric.
    """
    found: list[str] = []

    def look(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            if not node.name:
                raise ExpressionError(f"{expression}: a selector without a metric's name")
            found.append(node.prettify().split(" offset ")[0].strip())

    promql_parser.walk(parsed(expression, **variables), look)
    return found


def metrics(expression: Expression) -> set[str]:
    """Names of the series it reads. Raises: ExpressionError."""
    return {re.split(r"[{\s]", selector)[0] for selector in selectors(expression)}
