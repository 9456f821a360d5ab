"""Bytes of adapters, of LoRA slots, and of the vector, for a model of given sizes.

For saying before the start what an engine will allocate: the shapes are those that vLLM's LoRA
layers preallocate (`create_lora_weights`) and that plugin/target_modules.py stacks the vector in. A test
compares both with a running engine.
"""

from __future__ import annotations

from collections.abc import Iterable

from safegene_vllm.errors import ConfigError
from safegene_vllm.planner.model_shape import Linear, ModelShape

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank accepts: every slot is as large as one of these."""


def rank_bucket(rank: int) -> int:
    """The least of LORA_RANKS that holds `rank`. Errors: ConfigError above the greatest."""
    found = next((bucket for bucket in LORA_RANKS if bucket >= rank), None)
    if found is None:
        raise ConfigError(f"rank {rank}: vLLM's slots hold up to {LORA_RANKS[-1]}; use fewer.")
    return found


def wrapped(shape: ModelShape, targets: Iterable[str]) -> tuple[Linear, ...]:
    """The layers that --lora-target-modules `targets` gives slots to: whole packed ones."""
    named = frozenset(targets)
    return tuple(linear for linear in shape.linears if named & {linear.name, *linear.sites})


def slot_bytes(shape: ModelShape, targets: Iterable[str], bucket: int, dtype_bytes: int) -> int:
    """One slot, on the device: per part A (1, bucket, D_in) and B (1, width, bucket), all layers.

    A rank below the bucket is padded with zeros, which are held and read like the rest.
    """
    per_layer = sum(len(x.widths) * x.d_in + x.d_out for x in wrapped(shape, targets))
    return shape.layers * per_layer * bucket * dtype_bytes


def lora_bytes(shape: ModelShape, targets: Iterable[str], rank: int, dtype_bytes: int) -> int:
    """An adapter, or a vector over all layers, as it lies on disk: A (R, D_in), B (D_out, R)."""
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
    """The vector of the gain table, on the device: what a receipt calls vector_bytes.

    Per linear layer one pair. For the kernels A (n R, D_in) and B (D_out, R), n the layer's parts;
    `stacked`, for torch, A (n R, D_in) and Bᵀ (n R, D_out), n the parts that have a site, where Bᵀ
    holds zeros wherever a part's rows meet another part's columns.
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
    """The gain table itself: rows (S + 1, L) and token gains (L, T, 1) float32, token rows (T)
    int64.
    """
    return 4 * (slots + 1) * layers + 4 * layers * batched_tokens + 8 * batched_tokens
