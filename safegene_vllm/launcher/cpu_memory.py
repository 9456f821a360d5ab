"""Size of the KV cache on CPU.

vLLM's default takes 92 % of the memory and fails where less is free, so the launcher gives a size
that fits, unless the user gave one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safegene_vllm.launcher.vllm_args import VllmArgs, in_config_file

SIZE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
SIZE_FLAGS = ("kv-cache-memory-bytes", "gpu-memory-utilization")
OVERHEAD_BYTES = 2 * 2**30
"""Memory of the API process, of the workers, and of their activations."""
MIN_BYTES = 64 * 2**20
_NODES = Path("/sys/devices/system/node")
_CGROUP = Path("/sys/fs/cgroup")
# As vLLM counts them.
_AVAILABLE = ("MemFree", "Active(file)", "Inactive(file)", "SReclaimable")


@dataclass(frozen=True)
class Memory:
    """Bytes of the memory node that a worker uses, within the container's limit."""

    total: int
    available: int


def read_memory(nodes: Path = _NODES, cgroup: Path = _CGROUP) -> Memory | None:
    """Read the memory of the smallest node; None where Linux does not show it."""
    found = []
    for file in nodes.glob("node*/meminfo"):
        words = [line.split() for line in file.read_text().splitlines()]
        sizes = {word[2].rstrip(":"): int(word[3]) * 1024 for word in words if len(word) > 3}
        if sizes.get("MemTotal"):
            available = sum(sizes.get(key, 0) for key in _AVAILABLE)
            found.append(Memory(sizes["MemTotal"], available))
    if not found:
        return None
    node = min(found, key=lambda memory: memory.available)
    for limit_file, usage_file in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit = _number(cgroup / limit_file)
        if limit is not None and limit < node.total:
            free = max(0, limit - (_number(cgroup / usage_file) or 0))
            return Memory(limit, min(node.available, free))
    return node


def kv_cache_arguments(
    flags: VllmArgs,
    environ: Mapping[str, str],
    checkpoint: Path | None,
    memory: Memory | None,
) -> tuple[list[str], str | None]:
    """Flag for the size of the KV cache, and a line that reports it; empty if the user chose.

    Half of what the weights and the processes leave, per worker.
    """
    chosen = SIZE_VARIABLE in environ or any(flags.given(name) for name in SIZE_FLAGS)
    if memory is None or chosen or in_config_file(flags, frozenset(SIZE_FLAGS)):
        return [], None
    workers = flags.number("tensor-parallel-size") or 1
    weights = _weight_bytes(checkpoint, flags)
    # Of a model that is still to be downloaded, half of the memory is left to the weights.
    taken = memory.available // 2 if weights is None else weights + OVERHEAD_BYTES
    size = (memory.available - taken) // 2 // workers
    size = max(MIN_BYTES, size // MIN_BYTES * MIN_BYTES)
    each = f" for each of {workers} workers" if workers > 1 else ""
    note = (
        f"KV cache: {_gib(size)} GiB{each}, of {_gib(memory.available)} GiB free memory "
        f"({_gib(memory.total)} GiB in all); --kv-cache-memory-bytes sets another size"
    )
    return ["--kv-cache-memory-bytes", str(size)], note


def _weight_bytes(checkpoint: Path | None, flags: VllmArgs) -> int | None:
    """Bytes of the loaded weights; None if the checkpoint is not on this machine."""
    if checkpoint is None:
        return None
    files = [checkpoint] if checkpoint.is_file() else list(checkpoint.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    # A 16-bit checkpoint that is loaded in float32 doubles.
    return size * 2 if flags.value("dtype") in ("float32", "float") else size


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}" if size < 2**30 else f"{size / 2**30:.1f}"


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None
