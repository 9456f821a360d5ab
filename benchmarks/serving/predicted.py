"""What a roofline expects of the arms: bytes a decode step reads, products a prompt token takes.

Decode is taken to be bound by memory, prefill by arithmetic (Williams et al. 2009), and everything
but weights is left out: attention, caches, launches, HTTP. So it bounds what safety must cost; what
is measured beyond it is overhead.
"""

from __future__ import annotations

from dataclasses import dataclass

from arms import Arm, comparisons
from cells import Cell
from launching import slot_rank
from random_world import World, spread_layers
from ratios import BETWEEN, FIRST
from safegene_vllm.formats.adapter import layer_of

MODELED = (
    *("base", "lora", "lora_stock", "gain", "aside", "composed"),
    *("exported", "weights", "merged", "reloaded"),
)
"""Kinds that read each byte once; the host's CPU product gathers copies, token by token."""
BYTES = 2
"""Of one value in bf16 or fp16."""


@dataclass(frozen=True)
class Sizes:
    """`width`: sum of D_in + D_out over all linear sites; `by_layer` the same of each layer."""

    model_bytes: int
    linear: int
    by_layer: tuple[int, ...]

    @property
    def width(self) -> int:
        return sum(self.by_layer)

    def vector_width(self, percent: int) -> int:
        chosen = spread_layers(len(self.by_layer), percent)
        return sum(self.by_layer[layer] for layer in chosen)


def sizes_of(world: World) -> Sizes:
    by_layer = [0] * world.layers
    for site, (d_out, d_in) in world.sites.items():
        by_layer[layer_of(site) or 0] += d_out + d_in
    linear = sum(d_out * d_in for d_out, d_in in world.sites.values())
    return Sizes(world.model_bytes, linear, tuple(by_layer))


def decode_bytes(arm: Arm, cell: Cell, sizes: Sizes) -> int:
    """Bytes that one decode step of a full batch reads: weights, its tenants' slots, the vector."""
    found = sizes.model_bytes
    if arm.has_tenants:
        tenants = min(cell.tenants, cell.load.concurrency)
        found += tenants * slot_rank(arm, cell) * sizes.width * BYTES
    if arm.kind == "gain":
        found += cell.vector_rank * sizes.vector_width(arm.layers) * BYTES
    return found


def prefill_flops(arm: Arm, cell: Cell, sizes: Sizes) -> int:
    """Floating-point operations of one prompt token: two per weight it meets."""
    found = 2 * sizes.linear
    if arm.has_tenants:
        found += 2 * slot_rank(arm, cell) * sizes.width
    if arm.kind == "gain":
        found += 2 * cell.vector_rank * sizes.vector_width(arm.layers)
    return found


def predicted_ratios(cell: Cell, sizes: Sizes, *, on_cpu: bool) -> dict[str, float]:
    """By the measured ratios' names: time to first token by products, between tokens by bytes."""
    kinds = [k for k in MODELED if not (on_cpu and k == "lora_stock")]
    found: dict[str, float] = {}
    for arm, other in comparisons(cell.arms, on_cpu):
        if arm.kind in kinds and other.kind in kinds:
            name = f"{cell.name}.{arm.name}_over_{other.name}"
            first = prefill_flops(arm, cell, sizes) / prefill_flops(other, cell, sizes)
            between = decode_bytes(arm, cell, sizes) / decode_bytes(other, cell, sizes)
            found |= {f"{name}.{FIRST}": round(first, 4), f"{name}.{BETWEEN}": round(between, 4)}
    return found
