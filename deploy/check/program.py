"""Runs one outside program for a check, and tells what it said if it was not content."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

TIMEOUT_S = 240.0
Word = str | Path


def complaint(
    command: Sequence[Word], *, cwd: Path, env: Mapping[str, str] | None = None
) -> str | None:
    """None if the program ended with 0, else all that it wrote, or its exit code."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    if done.returncode == 0:
        return None
    said = (done.stdout + done.stderr).strip()
    return said or f"{command[0]} ended with {done.returncode}"


def output(command: Sequence[Word], *, cwd: Path) -> str:
    """What the program writes to stdout. Errors: CalledProcessError, with its stderr."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        check=True,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    return done.stdout
