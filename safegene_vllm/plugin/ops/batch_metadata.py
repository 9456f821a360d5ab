"""Which tokens of the running step belong to which slot, worked out on the device.

For the kernels: unlike the host's own tables these include the tokens without an adapter, and
making them never waits for the device. Not for gains: those are in the gain table.
"""

from __future__ import annotations

from typing import Any

import torch

BLOCKS = (16, 64)
"""Tokens per tile: small steps and large ones (product.tier)."""


class BatchMetadata:
    """Preallocated and updated in place, so that CUDA graphs see every step.

    `order` (T_max,) int32: token numbers grouped by slot, tokens without an adapter first.
    `tiles[i]` (M_i, 3) int32, for tiles of BLOCKS[i] tokens of one slot: (slot, first place in
    `order`, tokens). Tiles in use come first; the others have no tokens. Slot -1: no adapter.
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
        self.idle.fill_(idle)

    def set_tokens(self, slots: torch.Tensor) -> None:
        """In place: slots (T,) int64 of the step's tokens, -1 for no adapter, on the device.

        Shapes depend on T alone and nothing is read back. Tokens past T belong to no tile: a padded
        graph leaves their rows of y as they are.
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
    """The most tiles that `tokens` tokens can need: every slot may end in a part of one."""
    return min(tokens, -(-tokens // block) + slots + 1)
