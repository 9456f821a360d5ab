"""Float32 reference of the LoRA and safety products, which the kernels are tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def expected(
    y: torch.Tensor,
    x: torch.Tensor,
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    safety_a: torch.Tensor,
    safety_b: torch.Tensor,
    gains: torch.Tensor,
    layer: int,
    slots: torch.Tensor,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the layer's output with both products, and a bound on a kernel's rounding error.

    Semantics: for each part i, with s the slot of t and g = gains[s + 1, layer],
    out[t, i] = y[t, i] + scale (x[t] A_i[s]ᵀ) B_i[s]ᵀ + g (x[t] A'_iᵀ) B'_iᵀ; the middle term is
    absent for s = -1.
    Shapes: y (T, sum widths), x (T, D_in), a n times (S, 1, R, D_in), b n times (S, 1, width_i, R),
    safety_a (n R', D_in), safety_b (sum widths, R'), gains (S + 1, L) float32, slots (T,) int64.
    Returns out (T, sum widths) float32, and a bound of the same shape: one rounding of each hidden
    value and of the result to the dtype of x, and float32 sums over D_in.
    """
    out, bound = y.to(torch.float32, copy=True), torch.zeros_like(y, dtype=torch.float32)
    unit = torch.finfo(x.dtype).eps
    sums = torch.finfo(torch.float32).eps * x.shape[1]
    rank, column = safety_b.shape[1], 0
    for i, part in enumerate(b):
        width = part.shape[2]
        columns = slice(column, column + width)
        shared_a = safety_a[i * rank : (i + 1) * rank].float()
        shared_b = safety_b[columns].float()
        for slot in range(-1, part.shape[0]):
            rows = (slots == slot).nonzero()[:, 0]
            if not len(rows):
                continue
            products = [(shared_a, shared_b, float(gains[slot + 1, layer]))]
            if slot >= 0:
                products.append((a[i][slot, 0].float(), part[slot, 0].float(), scale))
            for left, right, factor in products:
                if factor == 0.0:
                    continue
                inputs = x[rows].float()
                hidden = factor * (inputs @ left.T)
                size = abs(factor) * (inputs.abs() @ left.abs().T)
                out[rows, columns] += hidden @ right.T
                bound[rows, columns] += (unit * hidden.abs() + sums * size) @ right.abs().T
        column += width
    return out, bound + unit * out.abs() + torch.finfo(x.dtype).tiny


def disagreement(got: torch.Tensor, want: torch.Tensor, bound: torch.Tensor) -> str | None:
    """Describe the largest excess over the bound; None if there is none. NaN exceeds any bound."""
    excess = (got.float() - want).abs() - bound
    wrong = ~(excess <= 0.0)
    if not bool(wrong.any()):
        return None
    worst = int(torch.where(wrong, excess.nan_to_num(nan=float("inf")), -1.0).argmax())
    token, column = divmod(worst, got.shape[1])
    return (
        f"{int(wrong.sum())} of {got.numel()} values differ, the worst at token {token}, column "
        f"{column}: {float(got[token, column]):g} instead of {float(want[token, column]):g}"
    )
