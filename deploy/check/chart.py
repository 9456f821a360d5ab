"""Checks of the Helm chart: every file in its ci/ renders, every file in its refused/ is rejected.

The first line of a file in refused/ states what the error must contain: `# expects: WORDS`.
"""

from __future__ import annotations

from pathlib import Path

from deploy.check import tools
from deploy.check.tools import error_output, output

KUBERNETES = ("1.31.0", "1.34.0", "1.37.0")
"""Releases that the chart is rendered and validated for."""
EXPECTS = "# expects: "


def chart_of(root: Path) -> Path:
    return root / "deploy" / "helm" / "safegene"


def render(chart: Path, values: Path, kubernetes: str) -> str:
    """Render the chart's objects as YAML. Raises: CalledProcessError; ToolsMissingError."""
    command: list[object] = [tools.find("helm"), "template", "safegene", chart, "--values", values]
    return output([*command, "--kube-version", kubernetes], cwd=chart)


def renders(root: Path) -> list[str]:
    """`helm lint --strict` and `helm template` with every file of ci/."""
    helm, chart = tools.find("helm"), chart_of(root)
    files = sorted(chart.glob("ci/*.yaml"))
    errors = [] if files else [f"{chart}/ci contains no values"]
    for values in files:
        for command in ("lint --strict", "template safegene"):
            arguments = [helm, *command.split(), chart, "--values", values]
            if error := error_output(arguments, cwd=chart):
                errors.append(f"ci/{values.name}: helm {command}: {error}")
    return errors


def rejects(root: Path) -> list[str]:
    """`helm template` rejects every file of refused/ on top of ci/gpu.yaml, for its reason."""
    helm, chart = tools.find("helm"), chart_of(root)
    files = sorted(chart.glob("refused/*.yaml"))
    errors = [] if files else [f"{chart}/refused contains no values"]
    base: list[object] = ["template", "safegene", chart, "--values", chart / "ci" / "gpu.yaml"]
    for values in files:
        name, first = f"refused/{values.name}", values.read_text().splitlines()[0]
        expected = first.removeprefix(EXPECTS)
        if expected == first or not expected:
            errors.append(f"{name} does not begin with `{EXPECTS}WORDS`")
            continue
        error = error_output([helm, *base, "--values", values], cwd=chart)
        if error is None:
            errors.append(f"{name} is not rejected")
        elif expected not in error:
            errors.append(f"{name} is rejected without {expected!r}: {error}")
    return errors
