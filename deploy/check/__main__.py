"""`make deploy-check`: everything in deploy/ that can be proved without a cluster or a container.

    python -m deploy.check [NAME ...]

Every check is a function of the repository's root that returns what is wrong. Nothing is left out
in silence: a tool that cannot be had is a fault too. What needs more than this is in README.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from deploy.check import chart, files, objects, rules, settings
from deploy.check.tools import ToolsMissingError

Check = Callable[[Path], list[str]]

CHECKS: Mapping[str, Check] = {
    "yaml": files.yaml_style,
    "dockerfiles": files.dockerfiles,
    "compose": files.compose,
    "prometheus": rules.prometheus,
    "rule-tests": rules.rule_tests,
    "alertmanager": rules.alertmanager,
    "chart": chart.renders,
    "chart-refuses": chart.refuses,
    "objects": objects.rendered_and_written,
    "settings": settings.accepted,
}
ROOT = Path(__file__).resolve().parents[2]


def main(arguments: list[str]) -> int:
    """Run the named checks, or all; 1 if any of them found something."""
    parser = argparse.ArgumentParser(prog="python -m deploy.check", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CHECKS))
    names = parser.parse_args(arguments).names or list(CHECKS)
    unknown = sorted(set(names) - set(CHECKS))
    if unknown:
        parser.error(f"no such check: {', '.join(unknown)}; there are {', '.join(CHECKS)}")
    faulty = 0
    for name in names:
        started = time.monotonic()
        try:
            faults = CHECKS[name](ROOT)
        except ToolsMissingError as error:
            faults = [str(error)]
        faulty += bool(faults)
        verdict = f"{len(faults)} fault(s)" if faults else "ok"
        print(f"{name:14} {verdict} ({time.monotonic() - started:.1f} s)", flush=True)
        for fault in faults:
            print("  " + fault.replace("\n", "\n  "), flush=True)
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
