"""Reference mathematics: W' = W + sum over layers of λ_l · B A, in three forms that agree.

Merged weight, LoRA weights (rank concatenation) and gain row, in float32 and plain torch. Every
fast path is tested against this file; only merging is tuned, because model loading waits for it.
Notation: L layers, T tokens, R rank, D_in, D_out. Source: docs/reference/format.md; LoRA is
Hu et al. 2021, arXiv:2106.09685.
"""

from __future__ import annotations

import torch

from safegene_vllm.errors import (
    FamilyMismatchError,
    NonFiniteError,
    SafegeneError,
    ShapeError,
    raise_errors,
)
from safegene_vllm.formats.adapter import Adapter, LoRAWeights, layer_of, plain_config
from safegene_vllm.formats.family import Family
from safegene_vllm.formats.profile import Profile, check_profile

BLOCK_ENTRIES = 1 << 17
"""Entries of a weight that are merged at a time; they fit a core's cache."""
_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
"""Dtypes that can be merged into, with integer types of the same size."""


def merged_weight_name(site: str) -> str:
    """Name in a checkpoint of the weight of a target module (a `site` in file formats)."""
    return f"{site}.weight"


def delta(lora: LoRAWeights, coefficient: float) -> torch.Tensor:
    """Weight delta of a LoRA: (D_out, D_in) float32.

    Semantics: coefficient · scaling · b @ a.
    """
    return (coefficient * lora.scaling) * (lora.b.float() @ lora.a.float())


def merge_into(
    weight: torch.Tensor, lora: LoRAWeights, coefficient: float, *, rows: int | None = None
) -> torch.Tensor:
    """Merge a LoRA into a weight: a new tensor (D_out, D_in) of its dtype and device.

    Semantics: weight + coefficient · scaling · b @ a, added in float32 (float64 for a float64
    weight), `rows` rows at a time: peak memory is one tensor and two blocks. At coefficient
    0.0 the same tensor is returned. Errors: ShapeError (shape, dtype), NonFiniteError (overflow).
    """
    if coefficient == 0.0:
        return weight
    if weight.dtype not in _BITS:
        raise ShapeError(
            f"weight has dtype {weight.dtype}, expected float32, bfloat16 or float16; a quantized "
            "weight cannot be added to: serve the tenant through the LoRA slot"
        )
    if tuple(weight.shape) != (lora.d_out, lora.d_in):
        raise ShapeError(
            f"weight has shape {tuple(weight.shape)}, the LoRA is for {(lora.d_out, lora.d_in)}"
        )
    wide = torch.promote_types(weight.dtype, torch.float32)
    a, b = (t.to(weight.device, wide) for t in (lora.a, lora.b))
    factor = coefficient * lora.scaling
    merged = torch.empty_like(weight)
    rows = rows or max(1, BLOCK_ENTRIES // lora.d_in)
    starts = range(0, lora.d_out, rows)
    work = torch.empty(min(rows, lora.d_out), lora.d_in, dtype=wide, device=weight.device)
    # Without its sign a float's bits order as integers, those of Inf and NaN above all others.
    int_dtype = _BITS[weight.dtype]
    bits, without_sign = merged.view(int_dtype), torch.iinfo(int_dtype).max
    unsigned = torch.empty_like(work, dtype=int_dtype)
    maxima = torch.empty(len(starts), dtype=int_dtype, device=weight.device)
    for number, start in enumerate(starts):
        block = slice(start, start + rows)
        sums = work[: b[block].shape[0]].copy_(weight[block])
        merged[block] = sums.addmm_(b[block], a, alpha=factor)
        block_bits = torch.bitwise_and(bits[block], without_sign, out=unsigned[: sums.shape[0]])
        torch.amax(block_bits, dim=(0, 1), out=maxima[number])
    infinite = int(torch.tensor(torch.inf, dtype=weight.dtype).view(int_dtype))
    if (highest := int(maxima.max())) >= infinite:
        start = starts[int((maxima == highest).nonzero()[0])]
        raise NonFiniteError(
            f"the merged weight holds NaN or Inf in rows {start}..{start + rows - 1} as "
            f"{weight.dtype}; lower the coefficient ({coefficient}) or use bfloat16"
        )
    return merged


def composed_lora(
    tenant: LoRAWeights | None, safety: LoRAWeights, coefficient: float
) -> LoRAWeights:
    """Tenant and safety LoRA as one of rank R_t + R_s, float32, scaling 1.

    Semantics: a = [a_t; a_s], b = [s_t b_t, coefficient · s_s b_s]. At coefficient 0.0 the tenant's
    own LoRA (float32, folded), since zeros need no rank. Without a tenant, b is then zero.
    Errors: ShapeError if D_in or D_out differ.
    """
    a_s, b_s = safety.a.float(), safety.b.float() * (coefficient * safety.scaling)
    if tenant is None:
        return LoRAWeights(a_s, b_s)
    if (tenant.d_in, tenant.d_out) != (safety.d_in, safety.d_out):
        raise ShapeError(
            f"the tenant's LoRA is for a weight {(tenant.d_out, tenant.d_in)}, "
            f"the family's for {(safety.d_out, safety.d_in)}"
        )
    a_t, b_t = tenant.a.float(), tenant.b.float() * tenant.scaling
    if coefficient == 0.0:
        return LoRAWeights(a_t, b_t)
    return LoRAWeights(torch.cat([a_t, a_s], dim=0), torch.cat([b_t, b_s], dim=1))


def gain_row(profile: Profile) -> torch.Tensor:
    """The profile as a row of the gain table: (L,) float32."""
    return torch.tensor(profile.coefficients, dtype=torch.float32)


def safety_product(x: torch.Tensor, lora: LoRAWeights, gain: torch.Tensor) -> torch.Tensor:
    """Term that the gain table adds to a linear layer's output: (T, D_out) float32.

    Semantics: ((x aᵀ) · gain[:, None]) (scaling · b)ᵀ, with x (T, D_in) of any float dtype and gain
    (T,), one coefficient per token.
    """
    shrunk = (x.float() @ lora.a.float().T) * gain.float()[:, None]
    return shrunk @ (lora.b.float() * lora.scaling).T


def compose_adapter(tenant: Adapter | None, family: Family, profile: Profile) -> Adapter:
    """Tenant, family and profile as one ordinary adapter, float32, scaling 1.

    Errors: those of `check_profile`; FamilyMismatchError naming each target module of
    another shape.
    """
    check_profile(profile, family.header)
    ours = {} if tenant is None else dict(tenant.lora_weights)
    lora_weights: dict[str, LoRAWeights] = {}
    errors: list[SafegeneError] = []
    for site in sorted(ours.keys() | family.lora_weights.keys()):
        own, safety = ours.get(site), family.lora_weights.get(site)
        if safety is None:
            assert own is not None
            lora_weights[site] = LoRAWeights(own.a.float(), own.b.float() * own.scaling)
            continue
        layer = layer_of(site)
        assert layer is not None
        try:
            lora_weights[site] = composed_lora(own, safety, profile.coefficients[layer])
        except ShapeError as error:
            errors.append(FamilyMismatchError(f"family {family.header.name!r}, {site}: {error}"))
    raise_errors(errors)
    base_model = None if tenant is None else tenant.base_model
    return Adapter(lora_weights, base_model, plain_config(lora_weights, base_model))
