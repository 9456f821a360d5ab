"""`make deploy-check`: everything in deploy/ that can be checked without a cluster or a container.

    python -m deploy.check [NAME ...]

A check is a function of the repository's root that returns a list of errors. A tool that cannot be
found is an error too. What needs a cluster is in README.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from deploy.check import chart, files, objects
from deploy.check.tools import ToolsMissingError

CHECKS: Mapping[str, Callable[[Path], list[str]]] = {
    "yaml": files.yaml_style,
    "dockerfiles": files.dockerfiles,
    "compose": files.compose,
    "prometheus": files.prometheus,
    "rule-tests": files.rule_tests,
    "alertmanager": files.alertmanager,
    "chart": chart.renders,
    "chart-refuses": chart.rejects,
    "objects": objects.rendered_and_written,
    "settings": objects.settings_files,
}
ROOT = Path(__file__).resolve().parents[2]


def main(arguments: list[str]) -> int:
    """Run the named checks, or all of them; return 1 if any has errors."""
    parser = argparse.ArgumentParser(prog="python -m deploy.check", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CHECKS))
    names = parser.parse_args(arguments).names or list(CHECKS)
    if unknown := sorted(set(names) - set(CHECKS)):
        parser.error(f"no such check: {', '.join(unknown)}; expected some of {', '.join(CHECKS)}")
    failed = False
    for name in names:
        started = time.monotonic()
        try:
            errors = CHECKS[name](ROOT)
        except ToolsMissingError as error:
            errors = [str(error)]
        failed |= bool(errors)
        verdict = f"{len(errors)} error(s)" if errors else "ok"
        print(f"{name:14} {verdict} ({time.monotonic() - started:.1f} s)", flush=True)
        for line in errors:
            print("  " + line.replace("\n", "\n  "), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
