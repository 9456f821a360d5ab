"""The rules, by Prometheus's own tools, and the runbook that every alert leads to."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from metrics_exporter import MODULES, metric_names
from typer.main import get_command

from deploy.check import tools
from deploy.prometheus import expressions
from deploy.prometheus.expressions import Expression, ExpressionError
from safegene_vllm.cli import build_app

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "prometheus"
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()
RULES = [
    rule
    for path in sorted((FOLDER / "rules").glob("*.yml"))
    for group in yaml.safe_load(path.read_text())["groups"]
    for rule in group["rules"]
]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
UNIT_TESTS = sorted((FOLDER / "tests").glob("*.yml"))


def run(tool: str, *arguments: str | Path) -> str:
    """Output of the tool, which must succeed."""
    done = subprocess.run(
        [tools.find(tool), *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_promtool_and_amtool_accept_the_files() -> None:
    assert "SUCCESS" in run("promtool", "check", "rules", *(FOLDER / "rules").glob("*.yml"))
    run("promtool", "check", "config", "--syntax-only", FOLDER / "prometheus.yml")
    assert "5 inhibit rules" in run("amtool", "check-config", FOLDER / "alertmanager.yml")


@pytest.mark.parametrize("path", UNIT_TESTS, ids=lambda path: path.stem)
def test_alerts_fire_and_are_silent_as_they_should(path: Path) -> None:
    run("promtool", "test", "rules", path)


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    fires, silent = set(), set()
    for path in UNIT_TESTS:
        for case in yaml.safe_load(path.read_text())["tests"]:
            for one in case.get("promql_expr_test", ()):
                for name in re.findall(r'ALERTS\{alertname="(\w+)"', one["expr"]):
                    (fires if one.get("exp_samples") else silent).add(name)
    assert fires == set(ALERTS)
    assert silent == set(ALERTS)


@pytest.mark.parametrize("name", ALERTS)
def test_every_alert_says_how_bad_what_and_what_to_do(name: str) -> None:
    alert = ALERTS[name]
    severity = alert["labels"]["severity"]
    assert severity in ("critical", "warning")
    annotations = alert["annotations"]
    assert set(annotations) == {"summary", "description", "runbook_url"}
    assert annotations["runbook_url"] == f"docs/runbook.md#{name.lower()}"
    section = RUNBOOK.split(f"\n### {name}\n\n")[1]
    assert section.startswith(f"{severity}. ")


def test_the_runbook_has_no_section_without_an_alert() -> None:
    assert re.findall(r"^### (\w+)$", RUNBOOK, re.MULTILINE) == sorted(
        ALERTS, key=lambda name: RUNBOOK.index(f"### {name}\n")
    )


def runbook_commands() -> list[str]:
    fences = re.findall(r"^```.*?\n(.*?)^```", RUNBOOK, re.DOTALL | re.MULTILINE)
    spans = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", RUNBOOK, flags=re.DOTALL | re.M))
    lines = [" ".join(text.partition("#")[0].split()) for text in "\n".join(fences).splitlines()]
    lines += [" ".join(span.split()) for span in spans]
    return sorted({line for line in lines if line.startswith("safegene ")})


@pytest.mark.parametrize("line", runbook_commands())
def test_every_command_of_the_runbook_exists(line: str) -> None:
    command: Any = get_command(build_app())
    _, *words = line.split()
    while words and hasattr(command, "commands"):
        assert words[0] in command.commands, line
        command = command.commands[words.pop(0)]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


def test_every_expression_reads_only_what_is_scraped_or_recorded() -> None:
    """Names are read from the server's own metric objects, so a metric renamed there fails here."""
    records = {rule["record"] for rule in RULES if "record" in rule}
    known = metric_names() | records | expressions.OF_PROMETHEUS
    every = [*expressions.rules(), *expressions.dashboards()]
    assert len(every) > 100
    unknown = {str(one): expressions.metrics(one) - known for one in every}
    assert {where: names for where, names in unknown.items() if names} == {}


def test_every_metric_of_the_server_is_used_or_left_out_on_purpose() -> None:
    used = {
        name
        for one in (*expressions.rules(), *expressions.dashboards())
        for name in expressions.metrics(one)
    }
    series = {name for name in metric_names(MODULES) if not name.endswith(("_sum", "_count"))}
    assert series - used == {"safegene_probe_duration_seconds"}


@pytest.mark.parametrize(
    ("text", "words"),
    [("sum(rate(x[5m])", "unclosed left parenthesis"), ('{job="x"}', "without a metric's name")],
)
def test_an_expression_that_cannot_be_read_is_named(text: str, words: str) -> None:
    with pytest.raises(ExpressionError, match=words) as caught:
        expressions.metrics(Expression("x.json", "panel", "Title", text))
    assert "x.json: panel 'Title'" in str(caught.value)


def test_the_reader_of_selectors() -> None:
    text = 'sum(rate(a{b="$tenant"}[5m] offset 1h)) / scalar(d) > max_over_time(e[1h:5m])'
    one = Expression("x", "panel", "t", text)
    assert expressions.selectors(one, tenant="acme") == ['a{b="acme"}', "d", "e"]
    assert expressions.metrics(one) == {"a", "d", "e"}
