"""Start-up self-test of the Triton kernels against the reference, on the worker's own device.

Uses random inputs of each layer's kind (parts, ranks, alignment) at reduced size. As a side effect,
every program that the engine will launch is compiled.
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
"""One step of every tier (triton_ops.TIERS)."""


def check(
    shapes: Iterable[LayerShape],
    dtype: torch.dtype,
    device: Any,
    tokens: Iterable[int] = TOKENS,
) -> str | None:
    """Return a description of the first disagreement on `device`; None if there is none.

    An exception from the compiler, the driver or the device counts as a disagreement.
    """
    for shape in dict.fromkeys(shape.small() for shape in shapes):
        for count in tokens:
            try:
                failure = _one(shape, dtype, device, count)
            except Exception as error:
                failure = f"{type(error).__name__}: {str(error)[:200]}"
            if failure is not None:
                return f"{shape} in {dtype}, {count} tokens: {failure}"
    return None


def _one(shape: LayerShape, dtype: torch.dtype, device: Any, count: int) -> str | None:
    """Check a step with adapters and gains of every kind, then one without any."""
    generator = torch.Generator().manual_seed(count)

    def random(*sizes: int) -> torch.Tensor:
        values = torch.randn(*sizes, generator=generator).div_(math.sqrt(sizes[-1]))
        return values.to(device=device, dtype=dtype)

    parts, rank = len(shape.widths), shape.rank
    a = [random(SLOTS, 1, rank, shape.d_in) for _ in shape.widths]
    b = [random(SLOTS, 1, width, rank) for width in shape.widths]
    safety_a = random(parts * shape.safety_rank, shape.d_in)
    safety_b = random(sum(shape.widths), shape.safety_rank)
    # Row 0 is for no adapter; slot 1 has gain 0.
    gains = torch.tensor([[9.0, 0.5], [9.0, -1.5], [9.0, 0.0], [9.0, 2.0]], device=device)
    slots = torch.randint(-1, SLOTS, (count,), generator=generator).to(device)
    batch = BatchMetadata(SLOTS, count, device)
    x, y = random(count, shape.d_in), random(count, sum(shape.widths))
    has_base_gain = torch.ones((), dtype=torch.bool)
    for step, table in ((slots, gains), (torch.full_like(slots, -1), torch.zeros_like(gains))):
        batch.set_tokens(step)
        batch.set_idle(False)
        wanted, bound = expected(y, x, a, b, safety_a, safety_b, table, 1, step)
        of_vector = (safety_a, safety_b, table, 1, has_base_gain)
        lora_linear(y, x, a, b, *of_vector, batch.order, batch.tiles, batch.idle, 1.0)
        failure = disagreement(y, wanted, bound)
        if failure is not None:
            return failure
    return None
