"""What a new tenant and a changed one take on a running, idle server, by vLLM's own load route.

The route answers when the engine holds the adapter, with SafeGene also when every worker's receipt
agrees. Where safety is merged by hand, the export is part of the change.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median

import httpx

from arms import BY_HAND
from launching import BenchError, Server, tenant_path

OTHER = 5000
"""Profiles from this number on are nobody's until a tenant is changed."""


def _post(url: str, body: dict[str, str]) -> None:
    answer = httpx.post(url, json=body, timeout=300)
    if answer.status_code != 200:
        raise BenchError(f"{url} answered {answer.status_code}: {answer.text[:500]}")


def _loaded_s(server: Server, name: str, path: Path) -> float:
    """Seconds until the tenant at `path` is served as `name`; it is taken out again after."""
    started = time.perf_counter()
    _post(f"{server.url}/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})
    seconds = time.perf_counter() - started
    _post(f"{server.url}/v1/unload_lora_adapter", {"lora_name": name})
    return seconds


def _changed_s(server: Server, number: int) -> float:
    """Seconds until tenant t0 is served with other coefficients, as a revision of its own."""
    arm, world, name = server.arm, server.world, f"t0-changed-{number}"
    if arm.kind not in BY_HAND:
        return _loaded_s(server, name, tenant_path(world, arm, 0, OTHER + number))
    world.protected(0, arm.layers, OTHER + number)
    with tempfile.TemporaryDirectory(dir=world.root) as folder:
        started = time.perf_counter()
        world.export(0, arm.layers, OTHER + number, Path(folder) / "t0")
        exported_s = time.perf_counter() - started
        return exported_s + _loaded_s(server, name, Path(folder) / "t0")


def changes(server: Server, count: int) -> dict[str, float]:
    """Medians of `count` loads of a new tenant (`load_s`) and changes of one (`change_s`)."""
    arm, world, first = server.arm, server.world, server.cell.tenants
    if not arm.has_tenants or not count:
        return {}
    # What is served has to be on the disk before the clock starts.
    paths = {first + k: tenant_path(world, arm, first + k, first + k) for k in range(count)}
    found = {"load_s": median(_loaded_s(server, f"new-{n}", p) for n, p in paths.items())}
    if arm.kind in ("gain", "composed", *BY_HAND):
        if arm.kind not in BY_HAND:
            for k in range(count):
                tenant_path(world, arm, 0, OTHER + k)
        found["change_s"] = median(_changed_s(server, k) for k in range(count))
    return found


def restarted(server: Server, start_s: float) -> dict[str, float]:
    """What a change takes where it needs a new process: with `merged` the export and the start."""
    if server.arm.kind == "weights":
        return {"change_s": start_s}
    if server.arm.kind != "merged":
        return {}
    world = server.world
    with tempfile.TemporaryDirectory(dir=world.root) as folder:
        started = time.perf_counter()
        world.export_merged(server.arm.layers, Path(folder) / "merged")
        return {"change_s": time.perf_counter() - started + start_s}
