"""Gain table: per-slot, per-layer coefficients of the one resident safety vector.

The vector is stored once per LoRA layer; the table says how much of it each LoRA slot gets, so a
coefficient change writes one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from safegene_vllm.plugin.ops.punica_proxy import PunicaProxy


class GainTable:
    """Gains of all LoRA slots, and of the tokens of the running step.

    `rows` (S + 1, L) float32 on the device; row 0 is "no adapter", row s + 1 is slot s.
    `token_gains` (L, T_max, 1) float32: each token's gain in each layer, derived from `rows`.
    Both are preallocated and updated in place, so compiled graphs and CUDA graphs see every change.

    `base` (L,) bool on the CPU: whether tokens without an adapter ever had a gain in a layer. A
    CUDA graph keeps the value it was captured with, so row 0 is written before any capture.
    """

    def __init__(self, slots: int, layers: int, max_tokens: int, device: Any) -> None:
        self.rows = torch.zeros(slots + 1, layers, dtype=torch.float32, device=device)
        self.token_gains = torch.zeros(layers, max_tokens, 1, dtype=torch.float32, device=device)
        self.base = torch.zeros(layers, dtype=torch.bool)
        self.max_tokens = max_tokens
        self._token_rows = torch.zeros(max_tokens, dtype=torch.long, device=device)
        self._tokens = 0

    def write(self, slot: int, coefficients: Sequence[float]) -> None:
        """Write the row of `slot` (-1: no adapter) in place; other rows are not touched."""
        row = torch.tensor(coefficients, dtype=torch.float32)
        self.rows[slot + 1].copy_(row)
        if slot == -1:
            self.base |= row != 0.0
        self._refresh_token_gains()

    def read(self, slot: int) -> list[float]:
        """Return the row of `slot` as the device holds it; synchronizes with the device."""
        return [float(v) for v in self.rows[slot + 1].cpu()]

    def set_tokens(self, slots: torch.Tensor) -> None:
        """Set the step's slots in place: (T,) int64, -1 for no adapter.

        Gains of tokens past T are left as they are: a padded graph computes them, and their output
        is discarded.
        """
        self._tokens = slots.shape[0]
        torch.add(slots, 1, out=self._token_rows[: self._tokens])
        self._refresh_token_gains()

    def _refresh_token_gains(self) -> None:
        """Semantics: token_gains[l, t] = rows[token_rows[t], l]; once a step, not once a layer."""
        gains = self.token_gains[:, : self._tokens, 0]
        gains.copy_(self.rows.index_select(0, self._token_rows[: self._tokens]).t())


def add_safety(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, bt: torch.Tensor, gain: torch.Tensor
) -> None:
    """Add the gain-scaled safety product to a layer's output, in place.

    Semantics: y[t] += gain[t] * (x[t] Aᵀ) Bᵀ
    Shapes: y (T, D_out), x (T, D_in), a (R, D_in), bt = Bᵀ (R, D_out) of the model's dtype; gain
    (T_max, 1) float32 with T_max >= T, one layer's row of GainTable.token_gains.
    A gain of 0.0 adds exact zeros. Every row of y depends on its own row of x alone.
    """
    hidden = torch.nn.functional.linear(x, a)
    hidden.mul_(gain[: x.shape[0]])  # multiplied in float32, rounded once
    y.addmm_(hidden, bt)


class GainPunica(PunicaProxy):
    """Punica wrapper of one layer with a vector: vLLM's LoRA product, then the safety product."""

    def __init__(self, inner: Any, a: torch.Tensor, bt: torch.Tensor, gain: torch.Tensor) -> None:
        super().__init__(inner)
        self.a = a
        self.bt = bt
        self.gain = gain

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: Any,
        lora_b_stacked: Any,
        scale: float,
        output_slices: Any,
        **kwargs: Any,
    ) -> Any:
        """Update y (T, D_out) in place, as vLLM's wrapper does."""
        out = self.inner.add_lora_linear(
            y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **kwargs
        )
        add_safety(y, x, self.a, self.bt, self.gain)
        return out
