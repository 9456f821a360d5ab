"""A LoRA layer's product on a GPU: every token's adapter and its share of the vector, two launches.

For the layers that carry the vector; as many launches as the host needs for the adapters alone,
less the one that zeroes its buffer. Not for choosing whether to use it: plugin/ops/triton_lora.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from safegene_vllm.plugin.ops import triton_kernels
from safegene_vllm.plugin.ops.batch_metadata import BLOCKS, BatchMetadata, tile_count
from safegene_vllm.plugin.ops.layer_weights import LayerWeights

MAX_PARTS = 3
"""Parts of a packed projection (q, k, v) that the programs have arguments for."""


@dataclass(frozen=True)
class Tier:
    """How steps of up to `tokens` tokens are cut: D_in in `split` shares, tiles of a block."""

    tokens: int
    block: int
    split: int


TIERS = (Tier(256, 0, 8), Tier(1024, 1, 4), Tier(1 << 62, 1, 1))
"""`block` indexes BLOCKS. Three, so that all of them can be compiled before the first request."""


def tier(tokens: int) -> Tier:
    return next(t for t in TIERS if tokens <= t.tokens)


def launch(program: Any, grid: int, *args: Any, **meta: Any) -> None:
    """Every launch of this module goes through here: `grid` blocks of one Triton program."""
    program[(grid,)](*args, **meta)


def lora_linear(
    y: torch.Tensor,
    x: torch.Tensor,
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    safety_a: torch.Tensor,
    safety_b: torch.Tensor,
    gains: torch.Tensor,
    layer: int,
    base: torch.Tensor,
    order: torch.Tensor,
    tiles: Sequence[torch.Tensor],
    idle: torch.Tensor,
    scale: float,
) -> None:
    """Add every token's own adapter and its share of the vector to a layer's output, in place.

    Semantics and shapes: reference.expected; order, tiles and idle are those of BatchMetadata.
    base () bool on the CPU: whether tokens without an adapter have a gain here. Where they have
    none and no token has an adapter, nothing is launched; which other tiles have nothing to do is
    decided on the device. Everything is one dtype; x and y are dense in their last dimension.
    """
    tokens, d_in = x.shape
    if tokens == 0 or (bool(idle.item()) and not bool(base.item())):
        return
    slots, _, rank, _ = a[0].shape
    parts, safety_rank = len(a), safety_b.shape[1]
    cut = tier(tokens)
    block_m = BLOCKS[cut.block]
    table = tiles[cut.block]
    count = min(tile_count(tokens, slots, block_m), table.shape[0])
    widths = [part.shape[2] for part in b]
    hidden = torch.empty(
        (tokens, cut.split, parts * (rank + safety_rank)), dtype=torch.float32, device=x.device
    )
    shared = (gains, order, table, tokens, layer, gains.shape[1])
    sizes = {"PARTS": parts, "RANK": rank, "SAFETY_RANK": safety_rank, "SPLIT": cut.split}
    block_n, block_s = _block(rank), _block(parts * safety_rank)
    columns = parts * -(-rank // block_n) + -(-parts * safety_rank // block_s)
    launch(
        triton_kernels.shrink,
        count * cut.split * columns,
        *(hidden, x, *_three(a), safety_a, *shared, d_in, x.stride(0), scale),
        **sizes,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_S=block_s,
        BLOCK_K=256 // x.element_size(),
        num_warps=4,
        num_stages=3,
    )
    block_n = 128
    launch(
        triton_kernels.expand,
        count * sum(-(-width // block_n) for width in widths),
        *(y, hidden, *_three(b), safety_b, *shared, *_three(widths), y.stride(0)),
        **sizes,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_R=_block(rank),
        BLOCK_S=_block(safety_rank),
        ALIGNED=16 if all(n % 16 == 0 for n in (*widths, y.stride(0))) else 1,
        num_warps=4 if block_m == 16 else 8,
        num_stages=2,
    )


def _block(columns: int) -> int:
    """Columns per program: the power of two that holds them all, within what a dot can take."""
    return min(64, max(16, 1 << (columns - 1).bit_length()))


def _three(values: Sequence[Any]) -> tuple[Any, ...]:
    """Arguments of parts that are not there repeat the first; the programs never look at them."""
    return (*values, *[values[0]] * (MAX_PARTS - len(values)))


def add_product(
    y: torch.Tensor,
    x: torch.Tensor,
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    site: LayerWeights,
    plan: BatchMetadata,
    scale: float = 1.0,
) -> None:
    """lora_linear as one opaque operator, so that a compiled graph bakes in no decision of a step.

    In place: y (T, D_out).
    """
    torch.ops.safegene.gain_lora_linear(
        y,
        x,
        list(a),
        list(b),
        site.a,
        site.b,
        site.gains,
        site.layer,
        site.base,
        plan.order,
        plan.tiles,
        plan.idle,
        scale,
    )


_LIBRARY = torch.library.Library("safegene", "FRAGMENT")
_LIBRARY.define(
    "gain_lora_linear(Tensor(a!) y, Tensor x, Tensor[] a, Tensor[] b, Tensor safety_a, "
    "Tensor safety_b, Tensor gains, int layer, Tensor base, Tensor order, Tensor[] tiles, "
    "Tensor idle, float scale) -> ()"
)
_LIBRARY.impl("gain_lora_linear", lora_linear, "CUDA")
_LIBRARY.impl("gain_lora_linear", lambda *args: None, "Meta")
