"""`safegene doctor`: check the installation and this machine."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import Annotated

import typer

from safegene_vllm import __version__
from safegene_vllm.cli.console import clean, results
from safegene_vllm.doctor import Status, examine


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Check the installation and this machine, and name the command that corrects each error.

    Engine and torch, packages that break them, plugin entry points, extras, device, memory. Reads
    metadata and starts nothing. Exit code 1 if there is an error; `safegene serve` stops then, too.

    Example: safegene doctor
    """
    checks = examine(os.environ)
    failed = any(check.status is Status.ERROR for check in checks)
    console = results()
    if as_json:
        report = {"ok": not failed, "version": __version__, "checks": [asdict(c) for c in checks]}
        console.print(json.dumps(report, indent=2))
        raise typer.Exit(int(failed))
    width = max(len(check.name) for check in checks)
    for check in checks:
        console.print(clean(f"{check.status:<7}  {check.name:<{width}}  {check.found}"))
        if check.fix:
            console.print(clean(f"{'':<7}  {'':<{width}}  fix: {check.fix}"))
    counts = [
        f"{count} {status}{'' if count == 1 else 's'}"
        for status in (Status.ERROR, Status.WARNING)
        if (count := sum(check.status is status for check in checks))
    ]
    console.print("\n" + (", ".join(counts) or "no errors"))
    raise typer.Exit(int(failed))
