"""LoRA product of one layer on CUDA: every token's adapter and its share of the vector.

Two launches, as many as vLLM needs for the adapters alone less the one that zeroes its buffer.
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
"""Parts of a packed projection (q, k, v) that the kernels have arguments for."""


@dataclass(frozen=True)
class Tier:
    """Tiling of steps of up to `tokens` tokens: D_in in `split` parts, tiles of BLOCKS[block]."""

    tokens: int
    block: int
    split: int


TIERS = (Tier(256, 0, 8), Tier(1024, 1, 4), Tier(1 << 62, 1, 1))
"""Few enough that all of them are compiled before the first request."""


def tier(tokens: int) -> Tier:
    """Return the tiling of a step of `tokens` tokens."""
    return next(t for t in TIERS if tokens <= t.tokens)


def launch(program: Any, grid: int, *args: Any, **meta: Any) -> None:
    """Launch `grid` blocks of one Triton kernel; every launch of this module goes through here."""
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

    Semantics and shapes: see reference.expected; order, tiles, idle: see BatchMetadata.
    base () bool on the CPU: whether tokens without an adapter have a gain in this layer. If they
    have none and no token has an adapter, nothing is launched; other empty tiles are skipped on the
    device. All tensors have one dtype; x and y are contiguous in their last dimension.
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
    """Return the columns per program: a power of two within what `tl.dot` accepts."""
    return min(64, max(16, 1 << (columns - 1).bit_length()))


def _three(values: Sequence[Any]) -> tuple[Any, ...]:
    """Pad to three arguments by repeating the first; the kernels do not read the padding."""
    return (*values, *[values[0]] * (MAX_PARTS - len(values)))


def add_product(
    y: torch.Tensor,
    x: torch.Tensor,
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    weights: LayerWeights,
    batch: BatchMetadata,
    scale: float = 1.0,
) -> None:
    """Call lora_linear as one opaque operator; updates y (T, D_out) in place.

    Opaque, so that a compiled graph does not bake in a decision of the step it was traced in.
    """
    torch.ops.safegene.gain_lora_linear(
        y,
        x,
        list(a),
        list(b),
        weights.a,
        weights.b,
        weights.gains,
        weights.layer,
        weights.base,
        batch.order,
        batch.tiles,
        batch.idle,
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
