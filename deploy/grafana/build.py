"""Writes the dashboards' JSON: `python -m deploy.grafana.build` after a change of the code.

With --check nothing is written; it ends with 1 if what is checked in is not what the code makes.
"""

from __future__ import annotations

import sys
from pathlib import Path

from deploy.grafana import engine, fleet, tenant
from deploy.grafana.panels import to_json

FOLDER = Path(__file__).parent / "dashboards"


def made() -> dict[str, str]:
    """File name -> content."""
    return {
        f"{name}.json": to_json(room.build())
        for name, room in (("fleet", fleet), ("tenant", tenant), ("engine", engine))
    }


def stale() -> list[str]:
    """Files that are missing, differ from what the code makes, or that no code makes."""
    fresh = made()
    kept = {path.name: path.read_text() for path in FOLDER.glob("*.json")}
    return sorted(name for name in fresh.keys() | kept.keys() if fresh.get(name) != kept.get(name))


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        print(f"only --check is known, found {' '.join(arguments)!r}", file=sys.stderr)
        return 2
    if arguments:
        for name in stale():
            print(f"{name} is stale: run `python -m deploy.grafana.build`", file=sys.stderr)
        return 1 if stale() else 0
    FOLDER.mkdir(exist_ok=True)
    for name, content in made().items():
        (FOLDER / name).write_text(content)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
