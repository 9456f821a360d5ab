"""Documentation under test: what exists is described, and what is described exists."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import yaml
from prometheus_client import Counter, Gauge, Histogram
from typer.main import get_command

from safegene_server.engine_routes import load_router, router
from safegene_server.metrics import definitions
from safegene_server.metrics.settings import MetricsSettings
from safegene_server.monitoring.applied import STATES
from safegene_server.monitoring.probes import ProbeSettings, gauges
from safegene_server.sagemaker import ADAPTERS, INVOCATIONS
from safegene_vllm.cli import COMMANDS, build_app
from safegene_vllm.plugin.compat import NEWEST, OLDEST
from safegene_vllm.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
SERVING = (ROOT / "docs" / "serving.md").read_text()
PROBES = (ROOT / "docs" / "probes.md").read_text()
METRICS = (ROOT / "docs" / "metrics.md").read_text()
README = (ROOT / "README.md").read_text()


def test_every_setting_and_no_other_is_documented() -> None:
    section = SERVING.split("## Settings")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(Settings.model_fields)


def test_every_route_and_no_other_is_documented() -> None:
    section = SERVING.split("## Routes")[1].split("\n## ")[0]
    described = set(re.findall(r"^\| `(\w+ /[\w/]+)` \|", section, re.MULTILINE))
    real = {
        f"{method} {route.path}"
        for route in (*router.routes, *load_router.routes)
        for method in route.methods
    } | {f"POST {ADAPTERS}", f"POST {INVOCATIONS}"}
    assert described == real


def test_every_setting_of_probes_is_in_their_example_with_its_default() -> None:
    given = yaml.safe_load(PROBES.split("```yaml")[1].split("```")[0])["probes"]
    assert set(given) == {field.name for field in fields(ProbeSettings)}
    own = {"enabled", "prompts", "tenants"}
    defaults = {field.name: field.default for field in fields(ProbeSettings)}
    assert {k: v for k, v in given.items() if k not in own} == {
        k: v for k, v in defaults.items() if k not in own
    }
    assert ProbeSettings(**given).enabled


def test_every_metric_of_probes_and_no_other_is_documented() -> None:
    described = re.findall(r"^\| `(safegene_\w+)(?:\{([\w,]+)\})?` \|", PROBES, re.MULTILINE)
    metrics = [m for m in vars(gauges).values() if isinstance(m, Gauge | Counter)]
    real = {
        metric.describe()[0].name + ("_total" if isinstance(metric, Counter) else ""): ",".join(
            metric._labelnames
        )
        for metric in metrics
    }
    assert dict(described) == real and len(metrics) == 8


def test_every_metric_and_no_other_is_documented_with_type_and_labels() -> None:
    section = METRICS.split("## Every metric")[1].split("\n## ")[0]
    row = re.compile(r"^\| `(safegene_\w+)` \| ([cgh]) \|([\w, ]*)\| (.+) \|$", re.MULTILINE)
    found = row.findall(section)
    assert len(found) == len(re.findall(r"^\| `", section, re.MULTILINE))
    described = {name: (kind, labels.strip()) for name, kind, labels, _ in found}
    kinds = {Counter: "c", Gauge: "g", Histogram: "h"}
    real = {}
    for metric in (*vars(definitions).values(), *definitions.replica_gauges()):
        if type(metric) in kinds:
            name = metric._name + ("_total" if type(metric) is Counter else "")
            real[name] = (kinds[type(metric)], ", ".join(metric._labelnames))
    others = {name for name in described if name.startswith("safegene_probe_")}
    assert {name: told for name, told in described.items() if name not in others} == real
    assert len(described) == len(found), "a metric is described twice"


def test_the_values_of_labels_are_documented() -> None:
    for value in (*definitions.OUTCOMES, *definitions.REASONS, *STATES, definitions.RULE):
        assert f"`{value}`" in METRICS, value
    example = METRICS.split("metrics:\n")[1].split("```")[0]
    named = re.findall(r"^  (\w+):", example, re.MULTILINE)
    assert named == [field.name for field in fields(MetricsSettings)]


def test_the_supported_versions_are_the_documented_ones() -> None:
    low, high = (".".join(map(str, v)) for v in (OLDEST, NEWEST))
    assert f"vLLM outside {low} to {high}" in SERVING
    assert f"{low} to {high}" in README


def test_every_command_is_in_the_readme_and_teaches() -> None:
    command = get_command(build_app())
    assert set(command.commands) == set(COMMANDS)
    for name in COMMANDS:
        assert f"safegene {name}" in README, name
        for part in getattr(
            command.commands[name], "commands", {"": command.commands[name]}
        ).values():
            for parameter in part.params:
                told = getattr(parameter, "help", None)
                assert parameter.name == "help" or told, (name, parameter)


def test_the_file_tree_of_the_readme_is_real() -> None:
    tree = README.split("## What is where")[1].split("```")[1]
    paths = re.findall(r"^(\S+)", tree, re.MULTILINE)
    assert paths
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing
