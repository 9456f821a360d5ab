"""The kernels against the reference on the device at hand: a worker asks before it uses them.

Random inputs of a layer's own kind (parts, ranks, alignment), cut small; in passing, everything the
engine will launch is compiled. Not a benchmark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from safegene_vllm.plugin.ops.batch_metadata import BatchMetadata
from safegene_vllm.plugin.ops.layer_weights import LayerShape
from safegene_vllm.plugin.ops.reference import disagreement, expected
from safegene_vllm.plugin.ops.triton_ops import lora_linear

SLOTS = 3
TOKENS = (5, 300, 1100)
"""One step of every tier (product.TIERS)."""


def check(
    shapes: Iterable[LayerShape],
    dtype: torch.dtype,
    device: Any,
    tokens: Iterable[int] = TOKENS,
) -> str | None:
    """What is wrong with the kernels on `device`, in words; None where they can be trusted.

    Whatever a compiler, a driver or the device throws is caught: it is the answer.
    """
    for shape in dict.fromkeys(shape.small() for shape in shapes):
        for count in tokens:
            try:
                fault = _one(shape, dtype, device, count)
            except Exception as error:
                fault = f"{type(error).__name__}: {str(error)[:200]}"
            if fault is not None:
                return f"{shape} in {dtype}, {count} tokens: {fault}"
    return None


def _one(shape: LayerShape, dtype: torch.dtype, device: Any, count: int) -> str | None:
    """Adapters and gains of every kind in one step, then a step without any."""
    generator = torch.Generator().manual_seed(count)

    def random(*sizes: int) -> torch.Tensor:
        values = torch.randn(*sizes, generator=generator).div_(math.sqrt(sizes[-1]))
        return values.to(device=device, dtype=dtype)

    parts, rank = len(shape.widths), shape.rank
    a = [random(SLOTS, 1, rank, shape.d_in) for _ in shape.widths]
    b = [random(SLOTS, 1, width, rank) for width in shape.widths]
    safety_a = random(parts * shape.safety_rank, shape.d_in)
    safety_b = random(sum(shape.widths), shape.safety_rank)
    # Row 0 is for no adapter; slot 1 has no share of the vector.
    gains = torch.tensor([[9.0, 0.5], [9.0, -1.5], [9.0, 0.0], [9.0, 2.0]], device=device)
    slots = torch.randint(-1, SLOTS, (count,), generator=generator).to(device)
    plan = BatchMetadata(SLOTS, count, device)
    x, y = random(count, shape.d_in), random(count, sum(shape.widths))
    yes = torch.ones((), dtype=torch.bool)
    for step, table in ((slots, gains), (torch.full_like(slots, -1), torch.zeros_like(gains))):
        plan.set_tokens(step)
        plan.set_idle(False)
        want, bound = expected(y, x, a, b, safety_a, safety_b, table, 1, step)
        of_vector = (safety_a, safety_b, table, 1, yes)
        lora_linear(y, x, a, b, *of_vector, plan.order, plan.tiles, plan.idle, 1.0)
        fault = disagreement(y, want, bound)
        if fault is not None:
            return fault
    return None
