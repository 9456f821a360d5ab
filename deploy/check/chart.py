"""Checks of the Helm chart: every file in its ci/ renders, every file in its refused/ does not.

A file of refused/ says in its first line what the refusal must name: `# expects: WORDS`.
"""

from __future__ import annotations

from pathlib import Path

from deploy.check import tools
from deploy.check.program import Word, complaint, output

KUBERNETES = ("1.31.0", "1.34.0", "1.37.0")
"""The releases that the chart is rendered and validated for."""

EXPECTS = "# expects: "


def chart_of(root: Path) -> Path:
    return root / "deploy" / "helm" / "safegene"


def render(chart: Path, values: Path, kubernetes: str) -> str:
    """The chart's objects as YAML. Errors: CalledProcessError; ToolsMissingError."""
    helm = tools.find("helm")
    ask: list[Word] = [helm, "template", "safegene", chart, "--values", values]
    return output([*ask, "--kube-version", kubernetes], cwd=chart)


def renders(root: Path) -> list[str]:
    """`helm lint --strict` and `helm template` with every file of ci/."""
    helm, chart = tools.find("helm"), chart_of(root)
    files = sorted(chart.glob("ci/*.yaml"))
    if not files:
        return [f"{chart}/ci holds no values"]
    faults = []
    for values in files:
        for command in ("lint --strict", "template safegene"):
            said = complaint([helm, *command.split(), chart, "--values", values], cwd=chart)
            if said:
                faults.append(f"ci/{values.name}: helm {command}: {said}")
    return faults


def refuses(root: Path) -> list[str]:
    """`helm template` says no to every file of refused/ laid over ci/gpu.yaml, and why."""
    helm, chart = tools.find("helm"), chart_of(root)
    files = sorted(chart.glob("refused/*.yaml"))
    if not files:
        return [f"{chart}/refused holds no values"]
    faults = []
    for values in files:
        first = values.read_text().splitlines()[0]
        words = first.removeprefix(EXPECTS)
        if words == first or not words:
            faults.append(f"refused/{values.name} does not begin with `{EXPECTS}WORDS`")
            continue
        usual = chart / "ci" / "gpu.yaml"
        said = complaint(
            [helm, "template", "safegene", chart, "--values", usual, "--values", values], cwd=chart
        )
        if said is None:
            faults.append(f"refused/{values.name} is not refused")
        elif words not in said:
            faults.append(f"refused/{values.name} is refused without {words!r}: {said}")
    return faults
