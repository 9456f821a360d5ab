"""`make bench-kernels`: one LoRA layer's product on a GPU, with and without the vector in it.

Arms: our kernels; the same with all gains zero; vLLM's own kernels (if installed); those, or ours
with zero gains, followed by the plain torch product. Times are of CUDA graphs over many copies of a
layer, so that weights come from memory as in a decode step. The roofline is bytes over the copy
bandwidth of the same GPU. Without a GPU nothing is measured.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.results import commit, print_result, ratio
from safegene_vllm.plugin.ops.batch_metadata import BatchMetadata
from safegene_vllm.plugin.ops.gain_table import add_safety

SITES = {
    "qkv": ((3584, 512, 512), 3584),
    "o": ((3584,), 3584),
    "gate_up": ((18944, 18944), 3584),
    "down": ((3584,), 18944),
}
"""The linears of a layer of Qwen2.5-7B: output widths by part, inputs."""
Arm = Callable[[int], None]


@dataclass(frozen=True)
class Case:
    """One layer and one step: `tokens` tokens shared evenly by `tenants` adapters."""

    site: str
    tokens: int
    tenants: int
    rank: int = 16
    safety_rank: int = 16

    @property
    def widths(self) -> tuple[int, ...]:
        return SITES[self.site][0]

    @property
    def d_in(self) -> int:
        return SITES[self.site][1]

    def bytes(self, *, tenants: bool = True, vector: bool = True, size: int = 2) -> int:
        """Minimum memory traffic: weights in use and x once, y in and out."""
        parts, out = len(self.widths), sum(self.widths)
        lora = parts * self.d_in + out
        weights = self.rank * lora * min(self.tenants, self.tokens) if tenants else 0
        weights += self.safety_rank * lora if vector else 0
        return size * (weights + self.tokens * (self.d_in + 2 * out))


class Layers:
    """Copies of one layer, enough that their weights do not stay in the cache."""

    def __init__(self, case: Case, device: Any, dtype: torch.dtype, cache_bytes: int) -> None:
        self.case, self.slots = case, max(case.tenants, 1)
        self.count = min(64, 1 + 2 * cache_bytes // case.bytes())
        parts, out = len(case.widths), sum(case.widths)

        def random(*sizes: int) -> torch.Tensor:
            values = torch.randn(*sizes, device=device, dtype=torch.float32)
            return values.div_(math.sqrt(sizes[-1])).to(dtype)

        def each(*sizes: int) -> list[torch.Tensor]:
            return [random(*sizes) for _ in range(self.count)]

        shape = (self.slots, 1, case.rank)
        self.a = [[random(*shape, case.d_in) for _ in case.widths] for _ in range(self.count)]
        self.b = [
            [random(self.slots, 1, w, case.rank) for w in case.widths] for _ in range(self.count)
        ]
        self.safety_a = each(parts * case.safety_rank, case.d_in)
        self.safety_b = each(out, case.safety_rank)
        self.x, self.y = each(case.tokens, case.d_in), each(case.tokens, out)
        self.gains = torch.ones(self.slots + 1, 1, device=device)
        self.slot_of = torch.arange(case.tokens, device=device) % self.slots
        self.plan = BatchMetadata(self.slots, case.tokens, device)
        self.plan.set_tokens(self.slot_of)
        self.plan.set_idle(False)


def ours(layers: Layers, gains: torch.Tensor) -> Arm:
    from safegene_vllm.plugin.ops.triton_ops import lora_linear

    plan, yes = layers.plan, torch.ones((), dtype=torch.bool)
    metadata: Any = (gains, 0, yes, plan.order, plan.tiles, plan.idle, 1.0)

    def run(i: int) -> None:
        safety = (layers.safety_a[i], layers.safety_b[i])
        lora_linear(layers.y[i], layers.x[i], layers.a[i], layers.b[i], *safety, *metadata)

    return run


def stock(layers: Layers) -> Arm | None:
    """vLLM's two operators as its wrapper calls them; None where vLLM is not installed."""
    try:
        from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink
    except ImportError:
        return None
    case = layers.case
    meta = LoRAKernelMeta.make(layers.slots, case.tokens, device=layers.slot_of.device)
    meta.prepare_tensors(layers.slot_of)
    arguments = meta.meta_args(case.tokens, False)

    def run(i: int) -> None:
        shape = (len(case.widths), case.tokens, case.rank)
        buffer = torch.empty(shape, dtype=torch.float32, device=layers.slot_of.device)
        lora_shrink(layers.x[i], layers.a[i], buffer, *arguments, 1.0)
        lora_expand(buffer, layers.b[i], layers.y[i], *arguments, add_inputs=True)

    return run


def plain(layers: Layers, first: Arm) -> Arm:
    """`first`, then the safety product in torch, in the layout of the plain path."""
    case = layers.case
    stacked = []
    for b in layers.safety_b:
        bt = torch.zeros(layers.safety_a[0].shape[0], b.shape[0], dtype=b.dtype, device=b.device)
        column = 0
        for i, width in enumerate(case.widths):
            rows = slice(i * case.safety_rank, (i + 1) * case.safety_rank)
            bt[rows, column : column + width] = b[column : column + width].T
            column += width
        stacked.append(bt)
    gain = torch.ones(case.tokens, 1, device=layers.gains.device)

    def run(i: int) -> None:
        first(i)
        add_safety(layers.y[i], layers.x[i], layers.safety_a[i], stacked[i], gain)

    return run


def arms_of(layers: Layers) -> dict[str, Arm]:
    """Arms by name; the others are compared with the first one, which has no vector."""
    quiet = ours(layers, torch.zeros_like(layers.gains))
    vllm = stock(layers)
    arms = {"ours, gains zero": quiet, "ours": ours(layers, layers.gains)}
    if vllm is not None:
        arms = {"stock": vllm, **arms}
    return {**arms, "then torch": plain(layers, vllm or quiet)}


def graph_of(arm: Arm, copies: int) -> torch.cuda.CUDAGraph:
    def run() -> None:
        for i in range(copies):
            arm(i)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def microseconds(run: Callable[[], object], times: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1000.0 / times


def launches(arm: Arm) -> int:
    """Kernel launches of one call, by torch's profiler."""
    arm(0)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        arm(0)
        torch.cuda.synchronize()
    return sum(1 for event in seen.events() if event.device_type.name == "CUDA")


def bandwidth_gb_per_s() -> float:
    """Bytes read and written by a large copy."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    found = [microseconds(lambda: target.copy_(source), 5) for _ in range(5)]
    return 2 * source.nbytes / statistics.median(found) / 1000.0


def measure(case: Case, rounds: int, gb_per_s: float) -> dict[str, Any]:
    """One case: µs per layer and arm (medians of interleaved rounds), ratios, launches."""
    cache = int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20))
    layers = Layers(case, "cuda", torch.bfloat16, cache)
    arms = arms_of(layers)
    graphs = {name: graph_of(arm, layers.count) for name, arm in arms.items()}
    found: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            found[name].append(microseconds(graph.replay, 10) / layers.count)
    base = next(iter(arms))
    return {
        **asdict(case),
        "us": {name: round(statistics.median(v), 3) for name, v in found.items()},
        f"ratio_to_{base}": {name: ratio(values, found[base]) for name, values in found.items()},
        "launches": {name: launches(arm) for name, arm in arms.items()},
        "roofline_us": round(case.bytes() / gb_per_s / 1000.0, 3),
        "roofline_without_vector_us": round(case.bytes(vector=False) / gb_per_s / 1000.0, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 64, 256, 2048])
    parser.add_argument("--tenants", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--sites", nargs="+", choices=SITES, default=list(SITES))
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "commit": commit(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "results": [],
    }
    if not torch.cuda.is_available():
        print("no CUDA GPU: the kernels were not timed; `make test-kernels` runs without one")
        return print_result("kernels", result)
    result["copy_gb_per_s"] = round(bandwidth_gb_per_s(), 1)
    for site in arguments.sites:
        for tokens in arguments.tokens:
            for tenants in sorted({min(n, tokens) for n in arguments.tenants}):
                case = Case(site, tokens, tenants)
                found = measure(case, arguments.rounds, result["copy_gb_per_s"])
                result["results"].append(found)
                times = ", ".join(f"{name} {us:.2f} µs" for name, us in found["us"].items())
                print(
                    f"{site:8} {tokens:5} tokens {tenants:3} tenants: {times}, "
                    f"roofline {found['roofline_us']:.2f} µs, launches {found['launches']}",
                    flush=True,
                )
                torch.cuda.empty_cache()
    print_result("kernels", result)


if __name__ == "__main__":
    main()
