"""Checks of the machine: GPU, C++ compiler, memory, shared memory."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from safegene_vllm.doctor.check import Check, Status
from safegene_vllm.doctor.distributions import Distributions
from safegene_vllm.doctor.installation import engine_of, is_cpu_engine

GIB = 2**30
MIN_MEMORY_BYTES = 2 * GIB
MIN_SHM_BYTES = GIB - 1
"""Docker's default is 64 MB; docs/troubleshooting.md names 1 GB."""
COMPILERS = ("g++", "c++", "clang++")
_UNLIMITED_BYTES = 2**60


def machine_checks(
    found: Distributions, *, root: Path = Path("/"), path: str | None = None
) -> Iterator[Check]:
    """Yield the checks of this machine; `root` and `path` (PATH) are for tests."""
    yield from _devices(found, root)
    if is_cpu_engine(found):
        yield _compiler(path)
    yield _memory(root)
    yield _shared_memory(root / "dev/shm")


def _devices(found: Distributions, root: Path) -> Iterator[Check]:
    patterns = ("nvidia[0-9]*", "kfd", "dxg", "accel/accel[0-9]*")
    devices = sorted(str(p) for pattern in patterns for p in (root / "dev").glob(pattern))
    listed = ", ".join(devices)
    if engine_of(found) is None:
        yield Check("device", Status.OK, listed or "CPU only")
    elif is_cpu_engine(found):
        unused = f"; unused GPU: {listed}" if devices else ""
        status = Status.NOTE if devices else Status.OK
        yield Check("device", status, f"CPU, {os.cpu_count()} cores{unused}")
    elif devices:
        yield Check("device", Status.OK, listed)
    else:
        yield Check(
            "device",
            Status.WARNING,
            "vllm is built for GPUs and this machine shows none (container: is it passed in?)",
            "docker run --gpus all, or an installation for the CPU",
        )


def _compiler(path: str | None) -> Check:
    if found := next(filter(None, (shutil.which(name, path=path) for name in COMPILERS)), None):
        return Check("C++ compiler", Status.OK, found)
    return Check(
        "C++ compiler",
        Status.WARNING,
        "none; torch.compile on a CPU needs one",
        "apt-get install g++, or safegene serve ... --enforce-eager",
    )


def _memory(root: Path) -> Check:
    """Return the memory that is available: the machine's, or less if a container limits it."""
    available = _limit_left(root)
    text = _read(root / "proc/meminfo")
    if matched := re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE):
        available = min(available, int(matched[1]) * 1024)
    if available >= _UNLIMITED_BYTES:
        return Check("memory", Status.NOTE, "unknown")
    found = f"{available / GIB:.1f} GiB available"
    if available < MIN_MEMORY_BYTES:
        return Check("memory", Status.WARNING, f"{found}; even a small model needs more")
    return Check("memory", Status.OK, found)


def _limit_left(root: Path) -> int:
    """Return what the control group leaves in bytes; huge if there is no limit."""
    group = root / "sys/fs/cgroup"
    limit = _number(group / "memory.max") or _number(group / "memory/memory.limit_in_bytes")
    if limit is None or limit >= _UNLIMITED_BYTES:
        return _UNLIMITED_BYTES
    used = _number(group / "memory.current") or _number(group / "memory/memory.usage_in_bytes")
    return max(limit - (used or 0), 0)


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdecimal() else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _shared_memory(place: Path) -> Check:
    try:
        total = shutil.disk_usage(place).total
    except OSError:
        return Check("shared memory", Status.NOTE, f"{place} does not exist")
    if total < MIN_SHM_BYTES:
        return Check(
            "shared memory",
            Status.WARNING,
            f"{place} holds {total / GIB:.2f} GiB; vLLM's processes need 1 GiB",
            "docker run --shm-size 1g, or mount -o remount,size=1g /dev/shm",
        )
    return Check("shared memory", Status.OK, f"{total / GIB:.1f} GiB")
