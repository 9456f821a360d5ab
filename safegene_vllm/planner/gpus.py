"""GPU data sheets: memory, bandwidth, dense bf16 rate, PCIe bandwidth.

"80 GB" counts as 80 · 10⁹ bytes, slightly less than most drivers report; rates are peaks that no
kernel reaches.
"""

from __future__ import annotations

from dataclasses import dataclass

from safegene_vllm.errors import ConfigError

GB = 10**9


@dataclass(frozen=True)
class Gpu:
    """A GPU; `flops_per_s` is dense bf16 with float32 sums, `link_bytes_per_s` PCIe one way."""

    name: str
    memory_bytes: int
    bytes_per_s: float
    flops_per_s: float
    link_bytes_per_s: float


def _gpu(name: str, memory_gb: float, gb_per_s: float, tflops: float, link_gb_per_s: float) -> Gpu:
    return Gpu(name, int(memory_gb * GB), gb_per_s * GB, tflops * 1e12, link_gb_per_s * GB)


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _gpu("h100-sxm", 80, 3350, 989, 64),
        _gpu("h100-pcie", 80, 2000, 756, 64),
        _gpu("h200", 141, 4800, 989, 64),
        _gpu("b200", 180, 7700, 2250, 64),
        _gpu("mi300x", 192, 5300, 1307, 64),
        _gpu("a100-40", 40, 1555, 312, 32),
        _gpu("a100-80", 80, 2039, 312, 32),
        _gpu("l40s", 48, 864, 362, 32),
        _gpu("l4", 24, 300, 121, 32),
        _gpu("rtx-4090", 24, 1008, 165, 32),
    )
}
"""Data sheets of NVIDIA and AMD; a100 are the SXM boards, b200 one of a DGX; no sparsity."""


def find_gpu(
    name: str,
    *,
    memory_gb: float | None = None,
    bandwidth_gb_s: float | None = None,
    tflops: float | None = None,
    link_gb_s: float | None = None,
) -> Gpu:
    """Look up a GPU and replace the given figures; an unknown name needs all but the link.

    Errors: ConfigError.
    """
    known = GPUS.get(name)
    if known is None:
        missing = [
            option
            for option, value in (
                ("--memory-gb", memory_gb),
                ("--bandwidth", bandwidth_gb_s),
                ("--tflops", tflops),
            )
            if value is None
        ]
        if missing:
            raise ConfigError(
                f"--gpu {name}: not in the table ({', '.join(GPUS)}); give {', '.join(missing)} "
                "for another GPU."
            )
        known = Gpu(name, 0, 0.0, 0.0, 32.0 * GB)
    given = {
        "--memory-gb": memory_gb,
        "--bandwidth": bandwidth_gb_s,
        "--tflops": tflops,
        "--link-gb-s": link_gb_s,
    }
    for option, value in given.items():
        if value is not None and not 0 < value < 1e6:
            raise ConfigError(f"{option} {value:g}: expected a number above 0.")
    return Gpu(
        known.name,
        known.memory_bytes if memory_gb is None else int(memory_gb * GB),
        known.bytes_per_s if bandwidth_gb_s is None else bandwidth_gb_s * GB,
        known.flops_per_s if tflops is None else tflops * 1e12,
        known.link_bytes_per_s if link_gb_s is None else link_gb_s * GB,
    )
