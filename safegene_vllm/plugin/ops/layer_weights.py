"""One layer's part of the vector as the kernels read it, and the layer's shape.

Plain data without a dependency on Triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LayerWeights:
    """The vector of a layer of n parts: a (n R', D_in), b (sum widths, R') of the model's dtype.

    gains (S + 1, L) float32 are the gain table's rows, `layer` this layer's column of them; base ()
    bool on the CPU says whether tokens without an adapter have a gain here (GainTable.base).
    """

    a: torch.Tensor
    b: torch.Tensor
    gains: torch.Tensor
    layer: int
    base: torch.Tensor


@dataclass(frozen=True)
class LayerShape:
    """Shape of a layer: output widths by part, D_in, the adapters' rank R, the vector's rank R'."""

    widths: tuple[int, ...]
    d_in: int
    rank: int
    safety_rank: int

    def small(self) -> LayerShape:
        """Reduce to at most 271 columns a part and 2,063 inputs; alignment and ranks stay."""
        widths = tuple(_cut(width, 256) for width in self.widths)
        return LayerShape(widths, _cut(self.d_in, 2048), self.rank, self.safety_rank)


def _cut(size: int, limit: int) -> int:
    return size if size <= limit else limit + size % 16
