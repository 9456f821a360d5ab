"""Published repairs of a fine-tuned LoRA, on its pairs alone: SafeLoRA, SafeMERGE, RESTA, none.

Each is a pure function from the tenant's adapter to a repaired one, exactly as its paper says, in
float32 or wider. No model is run and nothing is trained: SaLoRA, which trains, is in salora.py.
W is the aligned model's weight, ΔW = scaling · B A the tenant's; D_out, D_in, rank R.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from safegene_vllm.composition import composed_lora, delta
from safegene_vllm.errors import ConfigError, SafegeneError, ShapeError, SiteError, raise_errors
from safegene_vllm.formats.adapter import Adapter, LoRAWeights, plain_config
from safegene_vllm.recipe.difference import lora_norm, truncated_lora

Alignment = Mapping[str, torch.Tensor | LoRAWeights]
"""V = W_aligned - W_base by site: a dense (D_out, D_in) tensor, or a LoRA pair if that is what it
is."""

Merge = Literal["exact", "linear"]
_DECIMALS = 5


@dataclass(frozen=True, eq=False)
class Repaired:
    """An adapter with scaling 1, the sites that the method changed, and what it found on the way.

    `similarity`: ρ by site, where the method has one. `notes` is plain JSON.
    """

    adapter: Adapter
    changed: tuple[str, ...] = ()
    similarity: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """For the benchmark's files."""
        return {
            "sites": len(self.adapter.lora_weights),
            "changed": list(self.changed),
            "similarity": dict(self.similarity),
            **self.notes,
        }


def as_adapter(lora_weights: Mapping[str, LoRAWeights], base_model: str | None) -> Adapter:
    """The pairs with scaling 1, float32."""
    plain = {
        site: LoRAWeights(p.a.float(), p.folded().b) for site, p in sorted(lora_weights.items())
    }
    return Adapter(plain, base_model, plain_config(plain, base_model))


def no_repair(task: Adapter) -> Repaired:
    """The tenant as it is."""
    return Repaired(as_adapter(task.lora_weights, task.base_model))


def projected(b: torch.Tensor, v: torch.Tensor | LoRAWeights) -> torch.Tensor:
    """C B with C = V Vᵀ / ‖V‖_F: (D_out, R) float64.

    Semantics: V (Vᵀ B) / ‖V‖_F; with V = s · B_v A_v it is s² · B_v (A_v A_vᵀ) (B_vᵀ B) / ‖V‖_F.
    C (D_out, D_out) itself is never formed. Errors: SiteError if V is zero (C is then 0/0).
    """
    b = b.double()
    if isinstance(v, LoRAWeights):
        norm = lora_norm(v)
        a_v, b_v = v.a.double(), v.b.double() * v.scaling
        raw = b_v @ ((a_v @ a_v.T) @ (b_v.T @ b))
    else:
        norm = float(v.double().norm())
        raw = v.double() @ (v.double().T @ b)
    if norm == 0.0:
        raise SiteError("the aligned and the base weight are equal, so C = V Vᵀ / ‖V‖ is 0/0")
    return raw / norm


def similarity(lora: LoRAWeights, v: torch.Tensor | LoRAWeights) -> float:
    """ρ = cos(C B A, B A) over all entries, 0 if either is zero, to five decimals as IBM's code.

    Semantics: ⟨P A, B A⟩ / (‖P A‖ ‖B A‖) with P = C B, through Gram matrices (R, R) in float64.
    """
    a, b = lora.a.double(), lora.b.double()
    p = projected(lora.b, v)
    rows = a @ a.T
    inner = float(((p.T @ b) * rows).sum())
    lengths = math.sqrt(
        max(float(((p.T @ p) * rows).sum()), 0.0) * max(float(((b.T @ b) * rows).sum()), 0.0)
    )
    return round(inner / lengths, _DECIMALS) if lengths > 0.0 else 0.0


def similarities(task: Adapter, alignment: Alignment) -> dict[str, float]:
    """ρ at every site of the tenant. Errors: SiteError or ShapeError, all sites in one message."""
    found: dict[str, float] = {}
    faults: list[SafegeneError] = []
    for site, lora in task.lora_weights.items():
        v = alignment.get(site)
        if v is None:
            faults.append(SiteError(f"{site}: no difference between aligned and base is given"))
            continue
        shape = (v.d_out, v.d_in) if isinstance(v, LoRAWeights) else tuple(v.shape)
        if shape != (lora.d_out, lora.d_in):
            faults.append(
                ShapeError(f"{site}: V is {shape}, the tenant's ΔW {(lora.d_out, lora.d_in)}")
            )
            continue
        try:
            found[site] = similarity(lora, v)
        except SiteError as error:
            faults.append(SiteError(f"{site}: {error}"))
    raise_errors(faults)
    return found


def safe_lora(
    task: Adapter, alignment: Alignment, *, threshold: float = 0.5, least: int | None = None
) -> Repaired:
    """SafeLoRA (Hsu et al. 2024, arXiv:2405.16833; IBM/SafeLoRA).

    Semantics: V = W_aligned - W_base; C = V Vᵀ / ‖V‖_F; ρ = cos(C B A, B A); B ← C B at the sites
    with ρ ≤ threshold. With `least` = k the threshold is the k-th smallest ρ, as in IBM's
    `select_layers_type="number"`: a "layer" there is a site here, and ties are projected too.
    C is no projector: it scales with ‖V‖_F, so a small V nearly deletes what it projects.
    Errors: ConfigError (least), those of `similarities`.
    """
    found = similarities(task, alignment)
    if least is not None:
        if not 1 <= least <= len(found):
            raise ConfigError(f"least is {least}, expected 1 to {len(found)}, the tenant's sites")
        threshold = sorted(found.values())[least - 1]
    lora_weights = dict(task.lora_weights)
    changed = tuple(site for site in sorted(found) if found[site] <= threshold)
    for site in changed:
        lora_weights[site] = replace(
            lora_weights[site], b=projected(lora_weights[site].b, alignment[site]).float()
        )
    notes = {"threshold": threshold}
    return Repaired(as_adapter(lora_weights, task.base_model), changed, found, notes)


def linear_lora(one: LoRAWeights, other: LoRAWeights, weights: tuple[float, float]) -> LoRAWeights:
    """What PEFT's `add_weighted_adapter(combination_type="linear")` makes of two pairs: rank R.

    Semantics: B = Σ √|w s| B_i and A = Σ ± √|w s| A_i, the sign being that of w s. B A then has the
    cross terms B_1 A_2 and B_2 A_1, which Σ w s B_i A_i has not. Errors: ShapeError (two ranks).
    """
    if (one.rank, one.d_in, one.d_out) != (other.rank, other.d_in, other.d_out):
        raise ShapeError(
            f"the linear merge adds factors, so ranks must agree; found {one.rank} and "
            f"{other.rank} for {(one.d_out, one.d_in)} and {(other.d_out, other.d_in)}: merge "
            "exactly instead"
        )
    shares = [w * p.scaling for w, p in zip(weights, (one, other), strict=True)]
    roots = [math.sqrt(abs(share)) for share in shares]
    signed = [math.copysign(root, share) for root, share in zip(roots, shares, strict=True)]
    a = signed[0] * one.a.float() + signed[1] * other.a.float()
    b = roots[0] * one.b.float() + roots[1] * other.b.float()
    return LoRAWeights(a, b)


def exact_lora(one: LoRAWeights, other: LoRAWeights, weights: tuple[float, float]) -> LoRAWeights:
    """Σ w_i ΔW_i as it is, by concatenation: rank R_1 + R_2, scaling 1."""
    weighted = replace(one, scaling=one.scaling * weights[0])
    return composed_lora(weighted, other, weights[1])


def _difference(one: LoRAWeights, other: LoRAWeights) -> LoRAWeights:
    return composed_lora(one, other, -1.0)


def safe_merge(
    task: Adapter,
    safety: Adapter,
    alignment: Alignment,
    *,
    threshold: float = 0.35,
    weights: tuple[float, float] = (0.8, 0.2),
    form: Merge = "exact",
) -> Repaired:
    """SafeMERGE (Djuhera et al. 2025, arXiv:2503.17239; aladinD/SafeMERGE).

    Semantics: ρ as in SafeLoRA; where ρ < threshold, ΔW ← w_0 ΔW_task + w_1 ΔW_safety, elsewhere
    the tenant's own. `safety` is a LoRA on the same aligned model, trained on safety data; where
    the tenant has no pair there is no ρ and nothing is merged. `form`: "exact" concatenates,
    "linear" adds factors as the authors' code does through PEFT. The notes tell for "linear" how
    far it is from the exact merge: ‖linear - exact‖_F / ‖exact‖_F over the merged sites.
    Errors: those of `similarities`; SiteError if `safety` lacks a site; ShapeError (linear, ranks).
    """
    found = similarities(task, alignment)
    changed = tuple(site for site in sorted(found) if found[site] < threshold)
    raise_errors(
        [
            SiteError(f"{site}: the safety LoRA has no pair here; train it on all linear modules")
            for site in changed
            if site not in safety.lora_weights
        ]
    )
    lora_weights = dict(task.lora_weights)
    off = total = 0.0
    for site in changed:
        exact = exact_lora(task.lora_weights[site], safety.lora_weights[site], weights)
        lora_weights[site] = exact
        if form == "linear":
            lora_weights[site] = linear_lora(
                task.lora_weights[site], safety.lora_weights[site], weights
            )
            off += lora_norm(_difference(lora_weights[site], exact)) ** 2
            total += lora_norm(exact) ** 2
    notes: dict[str, Any] = {"threshold": threshold, "weights": list(weights), "form": form}
    if form == "linear":
        notes["cross_term_error"] = math.sqrt(off / total) if total else 0.0
    return Repaired(as_adapter(lora_weights, task.base_model), changed, found, notes)


def dropped(lora: LoRAWeights, drop: float, seed: int) -> torch.Tensor:
    """DARE (Yu et al. 2024, arXiv:2311.03099) of ΔW: (D_out, D_in) float32, no longer low-rank.

    Semantics: each entry is 0 with probability `drop`, else ΔW / (1 - drop); its mean is ΔW.
    """
    if not 0.0 <= drop < 1.0:
        raise ConfigError(f"the drop rate is {drop}, expected 0 or more and less than 1")
    dense = delta(lora, 1.0)
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(dense.shape, generator=generator) >= drop
    return dense * kept / (1.0 - drop)


def resta(
    task: Adapter,
    vector: Mapping[str, LoRAWeights],
    b: float,
    *,
    drop: float = 0.0,
    rank: int | None = None,
    seed: int = 0,
) -> Repaired:
    """RESTA (Bhardwaj et al. 2024, arXiv:2402.11746), with `drop` its variant with DARE.

    Semantics: W_f + b · v with v = W_aligned - W_unaligned, so ΔW ← DARE(ΔW_task) + b · v: the
    tenant's pair and b · v, concatenated. v = 0 outside `vector`.
    DARE makes ΔW_task dense. To stay a LoRA it is cut to its leading `rank` directions (default:
    the tenant's own rank) and the notes tell which share of ‖DARE(ΔW)‖²_F they hold. As DARE adds
    noise of drop / (1 - drop) times ‖ΔW‖²_F, spread over all directions, the cut takes most of that
    noise off again; `dropped` gives the dense form to merge into a checkpoint.
    Errors: ConfigError (drop, rank), ShapeError (shapes differ at a site).
    """
    if rank is not None and rank < 1:
        raise ConfigError(f"rank is {rank}, expected at least 1")
    lora_weights: dict[str, LoRAWeights] = {}
    kept = total = 0.0
    for site in sorted(task.lora_weights.keys() | vector.keys()):
        own, ours = task.lora_weights.get(site), vector.get(site)
        if own is not None and drop > 0.0:
            dense = dropped(own, drop, seed ^ zlib.crc32(site.encode()))
            if bool(dense.any()):
                own, site_total, site_kept = truncated_lora(dense, rank or own.rank)
                kept, total = kept + site_kept, total + site_total
        if ours is None:
            assert own is not None
            lora_weights[site] = own
        else:
            lora_weights[site] = composed_lora(own, ours, b)
    notes: dict[str, Any] = {"b": b, "drop": drop}
    if drop > 0.0:
        notes |= {"rank": rank, "seed": seed, "energy_kept": kept / total if total else 1.0}
    changed = tuple(sorted(vector)) if b != 0.0 else ()
    return Repaired(as_adapter(lora_weights, task.base_model), changed, {}, notes)
