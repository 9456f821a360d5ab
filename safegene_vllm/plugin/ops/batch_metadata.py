"""Batch metadata for the Triton kernels: the step's tokens by LoRA slot, computed on the device.

Unlike vLLM's own tables, these include the tokens without an adapter, and computing them never
synchronizes with the device.
"""

from __future__ import annotations

from typing import Any

import torch

BLOCKS = (16, 64)
"""Tokens per tile, for small and for large steps (triton_ops.TIERS)."""


class BatchMetadata:
    """Tokens of the running step by slot; preallocated and updated in place for CUDA graphs.

    `order` (T_max,) int32: token numbers grouped by slot, tokens without an adapter first.
    `tiles[i]` (M_i, 3) int32, for tiles of BLOCKS[i] tokens of one slot: (slot, offset into
    `order`, tokens). Tiles in use come first; the others have 0 tokens. Slot -1: no adapter.
    `idle` (1,) bool on the CPU: no token of the step has an adapter.
    """

    def __init__(self, slots: int, max_tokens: int, device: Any) -> None:
        def integers(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.int32, device=device)

        self.slots = slots
        self.order = integers(max_tokens)
        self.tiles = [integers(tile_count(max_tokens, slots, b), 3) for b in BLOCKS]
        self.idle = torch.ones(1, dtype=torch.bool)
        self._edges = torch.arange(-1, slots + 1, device=device)
        self._numbers = [torch.arange(t.shape[0], device=device) for t in self.tiles]

    def set_idle(self, idle: bool) -> None:
        """Set whether no token of the step has an adapter."""
        self.idle.fill_(idle)

    def set_tokens(self, slots: torch.Tensor) -> None:
        """Set the step's slots in place: (T,) int64 on the device, -1 for no adapter.

        Shapes depend on T alone and nothing is read back. Tokens past T belong to no tile, so a
        padded graph does not change their rows of y.
        """
        ordered, order = torch.sort(slots, stable=True)
        self.order[: slots.shape[0]].copy_(order)
        starts = torch.searchsorted(ordered, self._edges)
        first, sizes = starts[:-1], starts[1:] - starts[:-1]
        for block, tiles, numbers in zip(BLOCKS, self.tiles, self._numbers, strict=True):
            needed = (sizes + block - 1) // block
            ends = torch.cumsum(needed, dim=0)
            group = torch.searchsorted(ends, numbers, right=True)
            beyond = group > self.slots
            group = group.clamp(max=self.slots)
            skipped = (numbers - (ends - needed)[group]) * block
            count = (sizes[group] - skipped).clamp(0, block).masked_fill(beyond, 0)
            tiles[:, 0].copy_(group - 1)
            tiles[:, 1].copy_(first[group] + skipped)
            tiles[:, 2].copy_(count)


def tile_count(tokens: int, slots: int, block: int) -> int:
    """Return the maximum number of tiles: each slot may end in a partial one."""
    return min(tokens, -(-tokens // block) + slots + 1)
