"""Bytes of adapters, of LoRA slots, and of the vector.

Shapes are those that vLLM's LoRA layers preallocate (`create_lora_weights`) and those in which
plugin/target_modules.py stacks the vector. A test compares both with a running engine.
"""

from __future__ import annotations

from collections.abc import Iterable

from safegene_vllm.errors import ConfigError
from safegene_vllm.planner.model_shape import Linear, ModelShape

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's --max-lora-rank: the possible ranks of a slot."""


def rank_bucket(rank: int) -> int:
    """Round `rank` up to one of LORA_RANKS. Errors: ConfigError above the largest."""
    found = next((bucket for bucket in LORA_RANKS if bucket >= rank), None)
    if found is None:
        raise ConfigError(f"rank {rank}: vLLM's slots hold up to {LORA_RANKS[-1]}; use fewer.")
    return found


def wrapped(shape: ModelShape, targets: Iterable[str]) -> tuple[Linear, ...]:
    """Linear layers to which --lora-target-modules `targets` adds slots: whole packed ones."""
    named = frozenset(targets)
    return tuple(linear for linear in shape.linears if named & {linear.name, *linear.sites})


def slot_bytes(shape: ModelShape, targets: Iterable[str], bucket: int, dtype_bytes: int) -> int:
    """Device bytes of one slot: per part A (1, bucket, D_in) and B (1, width, bucket), all layers.

    A rank below the bucket is padded with zeros, which take memory and bandwidth too.
    """
    per_layer = sum(len(x.widths) * x.d_in + x.d_out for x in wrapped(shape, targets))
    return shape.layers * per_layer * bucket * dtype_bytes


def lora_bytes(shape: ModelShape, targets: Iterable[str], rank: int, dtype_bytes: int) -> int:
    """File bytes of an adapter, or of a vector over all layers: A (R, D_in), B (D_out, R)."""
    named = frozenset(targets)
    per_layer = 0
    for linear in shape.linears:
        if len(linear.sites) == 1:
            per_layer += (linear.d_in + linear.d_out) * (linear.sites[0] in named)
        else:
            per_layer += sum(
                linear.d_in + width
                for site, width in zip(linear.sites, linear.widths, strict=True)
                if site in named
            )
    return shape.layers * per_layer * rank * dtype_bytes


def vector_bytes(
    shape: ModelShape,
    targets: Iterable[str],
    rank: int,
    layers: int,
    dtype_bytes: int,
    *,
    stacked: bool,
) -> int:
    """Device bytes of the gain table's vector: `vector_bytes` of a receipt.

    Per linear layer A and B. For the Triton kernels A (n R, D_in) and B (D_out, R), n the layer's
    parts; `stacked`, for torch, A (n R, D_in) and Bᵀ (n R, D_out), n the parts that have a site,
    where Bᵀ is zero between one part's rows and another part's columns.
    """
    named = frozenset(targets)
    rows = 0
    for linear in shape.linears:
        parts = linear.parts_of(named)
        if stacked:
            rows += parts * (linear.d_in + linear.d_out)
        elif parts:
            rows += len(linear.widths) * linear.d_in + linear.d_out
    return layers * rows * rank * dtype_bytes


def gain_bytes(layers: int, slots: int, batched_tokens: int) -> int:
    """Bytes of the gain table: rows (S + 1, L), token gains (L, T, 1) float32; rows (T) int64."""
    return 4 * (slots + 1) * layers + 4 * layers * batched_tokens + 8 * batched_tokens
