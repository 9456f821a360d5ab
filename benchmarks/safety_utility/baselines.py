"""Published repairs of a fine-tuned LoRA: SafeLoRA, SafeMERGE, RESTA, and none.

Each is a pure function from the tenant's adapter to a repaired one, exactly as its paper says, in
float32 or wider. No model is run and nothing is trained: SaLoRA, which trains, is in salora.py.
W is the aligned model's weight, ΔW = scaling · B A the tenant's; D_out, D_in, rank R.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from safegene_vllm.composition import composed_lora
from safegene_vllm.errors import SafegeneError, ShapeError, SiteError, raise_errors
from safegene_vllm.formats.adapter import Adapter, LoRAWeights, plain_config
from safegene_vllm.recipe.difference import lora_norm

Alignment = Mapping[str, torch.Tensor | LoRAWeights]
"""V = W_aligned - W_base by target module: a dense (D_out, D_in) tensor, or LoRA weights."""


@dataclass(frozen=True, eq=False)
class Repaired:
    """An adapter with scaling 1, and the target modules that the method changed.

    `similarity`: ρ by target module, where the method has one. `notes` is plain JSON.
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
    """The LoRA weights with scaling 1, float32."""
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
    return round(inner / lengths, 5) if lengths > 0.0 else 0.0


def similarities(task: Adapter, alignment: Alignment) -> dict[str, float]:
    """ρ at every target module of the tenant. Errors: SiteError, ShapeError, all in one message."""
    found: dict[str, float] = {}
    errors: list[SafegeneError] = []
    for site, lora in task.lora_weights.items():
        v = alignment.get(site)
        if v is None:
            errors.append(SiteError(f"{site}: no difference between aligned and base is given"))
            continue
        shape = (v.d_out, v.d_in) if isinstance(v, LoRAWeights) else tuple(v.shape)
        if shape != (lora.d_out, lora.d_in):
            errors.append(
                ShapeError(f"{site}: V is {shape}, the tenant's ΔW {(lora.d_out, lora.d_in)}")
            )
            continue
        try:
            found[site] = similarity(lora, v)
        except SiteError as error:
            errors.append(SiteError(f"{site}: {error}"))
    raise_errors(errors)
    return found


def safe_lora(task: Adapter, alignment: Alignment, *, threshold: float = 0.5) -> Repaired:
    """SafeLoRA (Hsu et al. 2024, arXiv:2405.16833; IBM/SafeLoRA).

    Semantics: V = W_aligned - W_base; C = V Vᵀ / ‖V‖_F; ρ = cos(C B A, B A); B ← C B where
    ρ ≤ threshold. C is no projector: it scales with ‖V‖_F, so a small V nearly deletes what it
    projects. Errors: those of `similarities`.
    """
    found = similarities(task, alignment)
    lora_weights = dict(task.lora_weights)
    changed = tuple(site for site in sorted(found) if found[site] <= threshold)
    for site in changed:
        b = projected(lora_weights[site].b, alignment[site]).float()
        lora_weights[site] = replace(lora_weights[site], b=b)
    notes = {"threshold": threshold}
    return Repaired(as_adapter(lora_weights, task.base_model), changed, found, notes)


def safe_merge(
    task: Adapter,
    safety: Adapter,
    alignment: Alignment,
    *,
    threshold: float = 0.35,
    weights: tuple[float, float] = (0.8, 0.2),
) -> Repaired:
    """SafeMERGE (Djuhera et al. 2025, arXiv:2503.17239; aladinD/SafeMERGE).

    Semantics: ρ as in SafeLoRA; where ρ < threshold, ΔW ← w_0 ΔW_task + w_1 ΔW_safety, exactly, by
    concatenation; elsewhere the tenant's own. `safety` is a LoRA on the same aligned model, trained
    on safety data. The authors' code adds factors instead (PEFT's "linear"), which has cross terms.
    Errors: those of `similarities`; SiteError if `safety` lacks a target module.
    """
    found = similarities(task, alignment)
    changed = tuple(site for site in sorted(found) if found[site] < threshold)
    raise_errors(
        [
            SiteError(f"{site}: the safety LoRA has no weights; train it on all linear modules")
            for site in changed
            if site not in safety.lora_weights
        ]
    )
    lora_weights = dict(task.lora_weights)
    for site in changed:
        own = task.lora_weights[site]
        weighted = replace(own, scaling=own.scaling * weights[0])
        lora_weights[site] = composed_lora(weighted, safety.lora_weights[site], weights[1])
    notes = {"threshold": threshold, "weights": list(weights)}
    return Repaired(as_adapter(lora_weights, task.base_model), changed, found, notes)


def resta(task: Adapter, vector: Mapping[str, LoRAWeights], b: float) -> Repaired:
    """RESTA (Bhardwaj et al. 2024, arXiv:2402.11746), without its variant with DARE.

    Semantics: W_f + b · v with v = W_aligned - W_unaligned: the tenant's LoRA and b · v,
    concatenated. v = 0 outside `vector`. Errors: ShapeError.
    """
    added = {s: composed_lora(task.lora_weights.get(s), lora, b) for s, lora in vector.items()}
    lora_weights = {**task.lora_weights, **added}
    changed = tuple(sorted(vector)) if b != 0.0 else ()
    return Repaired(as_adapter(lora_weights, task.base_model), changed, {}, {"b": b})
