"""Safety vector as a weight difference: of two checkpoints, or from a LoRA.

Two checkpoints, aligned and degraded: per target module the best LoRA of rank R for W_A - W_D
(truncated SVD, Eckart & Young 1936). A LoRA that degraded the aligned model: minus that LoRA,
exactly. A LoRA that aligned a base: that LoRA, exactly. One module is in memory at a time.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from safegene_vllm.composition import merged_weight_name
from safegene_vllm.errors import (
    ConfigError,
    FamilyMismatchError,
    NonFiniteError,
    SafegeneError,
    SiteError,
    raise_errors,
)
from safegene_vllm.formats.adapter import WEIGHTS_FILE, LoRAWeights, layer_of, load_adapter
from safegene_vllm.formats.checkpoint import Checkpoint, read_checkpoint
from safegene_vllm.formats.family import Base, Family, base_of_checkpoint, make_family
from safegene_vllm.formats.safetensors_file import FLOAT_BITS
from safegene_vllm.recipe.degradation import degradation_of

Track = Callable[[Sequence[str]], Iterable[str]]
"""Wrapper of the module names to process, to show progress; `iter` shows none."""

# Their linear layers are Conv1D: the stored weight is (D_in, D_out), transposed.
_TRANSPOSED = ("GPT2", "OpenAIGPT", "ImageGPT", "DecisionTransformer")


@dataclass(frozen=True)
class Scope:
    """Filter of target modules: layer numbers and name endings (`q_proj`); None is all."""

    layers: tuple[int, ...] | None = None
    endings: tuple[str, ...] | None = None

    def contains(self, site: str) -> bool:
        if self.layers is not None and layer_of(site) not in self.layers:
            return False
        return self.endings is None or any(_ends(site, ending) for ending in self.endings)


@dataclass(frozen=True)
class SiteEnergy:
    """‖ΔW‖²_F of a target module, and how much of it its LoRA captures."""

    site: str
    total: float
    captured: float
    rank: int


@dataclass(frozen=True)
class LayerEnergy:
    """‖ΔW‖_F over a layer, and the share of ‖ΔW‖²_F that its LoRA weights capture (0 to 1)."""

    layer: int
    sites: int
    norm: float
    captured: float


@dataclass(frozen=True, eq=False)
class Difference:
    """LoRA weights by target module, their captured energy, and how they were made.

    `left_out`: differing tensors outside the linear modules (norms, biases, vocabulary), which no
    LoRA can represent.
    """

    base: Base
    lora_weights: Mapping[str, LoRAWeights]
    energies: tuple[SiteEnergy, ...]
    recipe: Mapping[str, Any]
    left_out: tuple[str, ...] = ()

    @property
    def captured(self) -> float:
        """Share of ‖ΔW‖²_F over all target modules that the LoRA weights capture (0 to 1)."""
        total = math.fsum(energy.total for energy in self.energies)
        return math.fsum(e.captured for e in self.energies) / total if total else 1.0

    def by_layer(self) -> list[LayerEnergy]:
        rows = []
        for layer in sorted({layer_of(energy.site) or 0 for energy in self.energies}):
            own = [e for e in self.energies if layer_of(e.site) == layer]
            total = math.fsum(e.total for e in own)
            captured = math.fsum(e.captured for e in own)
            share = min(captured / total, 1.0) if total else 1.0
            rows.append(LayerEnergy(layer, sum(e.rank > 0 for e in own), math.sqrt(total), share))
        return rows


def _ends(site: str, ending: str) -> bool:
    return site == ending or site.endswith("." + ending)


def lora_norm(lora: LoRAWeights) -> float:
    """‖scaling · b @ a‖_F without forming the product.

    Semantics: |scaling| · sqrt(trace((bᵀ b)(a aᵀ))), both Gram matrices (R, R) in float64.
    """
    a, b = lora.a.double(), lora.b.double()
    trace = float(((b.T @ b) * (a @ a.T)).sum())
    return abs(lora.scaling) * math.sqrt(max(trace, 0.0))


def truncated_lora(difference: torch.Tensor, rank: int) -> tuple[LoRAWeights, float, float]:
    """The best LoRA of at most `rank` for `difference` (D_out, D_in), ‖D‖²_F and ‖b @ a‖²_F.

    Semantics: with U the leading left singular vectors of D, b = U √σ and a = √σ⁻¹ Uᵀ D, float32
    on the CPU. U comes from the Gram matrix of D's smaller side in float64; b @ a is D projected
    onto U, so at full rank it is D whatever the conditioning. Directions with σ = 0 are dropped,
    so a's rank is at most D's. `difference` must not be zero.
    """
    d = difference.double()
    if d.shape[0] > d.shape[1]:
        lora, total, captured = truncated_lora(d.T, rank)
        return LoRAWeights(lora.b.T.contiguous(), lora.a.T.contiguous()), total, captured
    vectors = torch.linalg.eigh(d @ d.T).eigenvectors[:, -min(rank, d.shape[0]) :].flip(1)
    projected = vectors.T @ d
    sigma = projected.norm(dim=1)
    keep = sigma > sigma.max() * torch.finfo(torch.float64).eps * max(d.shape)
    root = sigma[keep].sqrt()
    lora = LoRAWeights(
        (projected[keep] / root[:, None]).float().cpu(), (vectors[:, keep] * root).float().cpu()
    )
    return lora, float(d.square().sum()), float(sigma[keep].square().sum())


def _linear_sites(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """(D_out, D_in) of every 2-D weight inside a layer, in the order of the files."""
    return {
        name.removesuffix(".weight"): info.shape
        for name, info in checkpoint.infos.items()
        if name.endswith(".weight") and len(info.shape) == 2 and layer_of(name) is not None
    }


def _chosen(sites: Iterable[str], scope: Scope, num_layers: int) -> list[str]:
    """The sites in `scope`. Errors: ConfigError if a layer or an ending matches nothing."""
    sites = list(sites)
    errors: list[SafegeneError] = []
    outside = sorted(n for n in scope.layers or () if not 0 <= n < num_layers)
    if outside:
        errors.append(ConfigError(f"layers {outside} are outside 0..{num_layers - 1}"))
    for ending in scope.endings or ():
        if not any(_ends(site, ending) for site in sites):
            known = ", ".join(sorted({site.rpartition(".")[2] for site in sites}))
            errors.append(ConfigError(f"no site ends in {ending!r}; there are: {known}"))
    raise_errors(errors)
    chosen = [site for site in sites if scope.contains(site)]
    if not chosen:
        raise ConfigError(f"layers {scope.layers} and sites {scope.endings} have no site in common")
    return chosen


def _base(directory: Path) -> Base:
    base = base_of_checkpoint(directory)
    if base.architecture.startswith(_TRANSPOSED):
        raise FamilyMismatchError(
            f"{directory} is a {base.architecture}, which stores its weights transposed (Conv1D); "
            "a LoRA for such a module would be applied transposed"
        )
    return base


def _check_same_family(aligned: Path, degraded: Path) -> Base:
    """The common base. Errors: FamilyMismatchError naming both and what differs."""
    base, other = _base(aligned), _base(degraded)
    if base == other:
        return base
    ours, theirs = (_linear_sites(read_checkpoint(path)) for path in (aligned, degraded))
    differing = [site for site in sorted(ours | theirs) if ours.get(site) != theirs.get(site)]
    shown = "; ".join(f"{s}: {ours.get(s)} and {theirs.get(s)}" for s in differing[:3])
    raise FamilyMismatchError(
        f"{aligned} ({base.architecture}, {base.num_layers} layers, {base.fingerprint}) and "
        f"{degraded} ({other.architecture}, {other.num_layers} layers, {other.fingerprint}) are "
        f"not of one family. {shown or 'The shapes agree'}."
    )


def _subtracted(
    aligned: Checkpoint, degraded: Checkpoint, name: str, device: str
) -> torch.Tensor | None:
    """W_A - W_D in float64, None if exactly zero. Errors: NonFiniteError naming the tensor."""
    difference = aligned.read(name).to(device).double() - degraded.read(name).to(device).double()
    if not bool(difference.isfinite().all()):
        raise NonFiniteError(f"{name} holds NaN or Inf in {aligned.directory}, or its counterpart")
    return difference if bool(difference.any()) else None


def _left_out(aligned: Checkpoint, degraded: Checkpoint) -> tuple[str, ...]:
    """Tensors outside the linear modules that differ, or are in one checkpoint only."""
    sites = {merged_weight_name(site) for site in _linear_sites(aligned)}
    found = []
    for name in sorted((aligned.infos.keys() | degraded.infos.keys()) - sites):
        ours, theirs = aligned.infos.get(name), degraded.infos.get(name)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            found.append(name)
        elif {ours.dtype, theirs.dtype} <= FLOAT_BITS.keys():
            one, other = aligned.read(name), degraded.read(name)
            if not torch.equal(one, other.to(one.dtype)):
                found.append(name)
    return tuple(found)


def _counted(names: Iterable[str]) -> dict[str, int]:
    """Counts of `names`, with layer numbers replaced by `*`."""
    return dict(Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names))


def between_checkpoints(
    aligned: Path,
    degraded: Path,
    *,
    rank: int,
    scope: Scope | None = None,
    device: str = "cpu",
    track: Track = iter,
) -> Difference:
    """W_A - W_D of two checkpoints, at most `rank` per module; equal modules get no LoRA.

    Errors: FamilyMismatchError naming both; ConfigError (rank, scope); ShapeError (quantized);
    NonFiniteError; SiteError if the checkpoints are equal everywhere; FormatError for the files.
    """
    scope = scope or Scope()
    if rank < 1:
        raise ConfigError(f"rank is {rank}, expected at least 1")
    try:
        torch.empty(0, device=device).double()
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ConfigError(f"device {device!r} cannot be used: {error}") from error
    base = _check_same_family(aligned, degraded)
    ours, theirs = read_checkpoint(aligned), read_checkpoint(degraded)
    lora_weights: dict[str, LoRAWeights] = {}
    energies: list[SiteEnergy] = []
    for site in track(_chosen(_linear_sites(ours), scope, base.num_layers)):
        difference = _subtracted(ours, theirs, merged_weight_name(site), device)
        if difference is None:
            energies.append(SiteEnergy(site, 0.0, 0.0, 0))
            continue
        lora_weights[site], total, captured = truncated_lora(difference, rank)
        energies.append(SiteEnergy(site, total, captured, lora_weights[site].rank))
    if not lora_weights:
        raise SiteError(
            f"{aligned} and {degraded} are equal at all {len(energies)} compared sites; "
            "there is no difference to extract"
        )
    left_out = _left_out(ours, theirs)
    recipe = {
        "method": "difference",
        "form": "checkpoints",
        "aligned": aligned.resolve().name,
        "degraded": degraded.resolve().name,
        "rank": rank,
        "left_out": _counted(left_out),
    }
    return _with_scope(Difference(base, lora_weights, tuple(energies), recipe, left_out), scope)


def of_adapter(
    checkpoint: Path,
    adapter: Path,
    role: Literal["aligned", "degraded"],
    *,
    scope: Scope | None = None,
) -> Difference:
    """The difference that a LoRA on `checkpoint` made, exactly and at its own rank.

    `degraded`: the LoRA degraded the aligned `checkpoint`, the vector is minus the LoRA.
    `aligned`: the LoRA aligned it, the vector is the LoRA. Modules whose B is zero are left out.
    Errors: FamilyMismatchError naming both; SiteError (a module in no layer, or nothing left);
    ConfigError (scope); FormatError for the files.
    """
    scope = scope or Scope()
    base = _base(checkpoint)
    loaded = load_adapter(adapter).lora_weights
    weights = _linear_sites(read_checkpoint(checkpoint))
    errors: list[SafegeneError] = []
    sites = _chosen(loaded, scope, base.num_layers)
    for site in sites:
        lora = loaded[site]
        if layer_of(site) is None:
            errors.append(
                SiteError(
                    f"{adapter}: {site} is in no layer, so no coefficient applies to it; choose "
                    "others with --sites, or train the adapter without it"
                )
            )
        elif weights.get(site) != (lora.d_out, lora.d_in):
            errors.append(
                FamilyMismatchError(
                    f"{adapter}: the weight of {site} is {(lora.d_out, lora.d_in)}, in "
                    f"{checkpoint} it is {weights.get(site)}"
                )
            )
    raise_errors(errors)
    sign = -1.0 if role == "degraded" else 1.0
    lora_weights: dict[str, LoRAWeights] = {}
    energies: list[SiteEnergy] = []
    for site in sites:
        lora = replace(loaded[site], scaling=sign * loaded[site].scaling)
        energy = lora_norm(lora) ** 2
        if bool(lora.b.any()) and lora.scaling != 0.0:
            lora_weights[site] = lora
        energies.append(SiteEnergy(site, energy, energy, lora.rank if site in lora_weights else 0))
    if not lora_weights:
        raise SiteError(f"{adapter}: B is zero at every site; there is no difference to extract")
    recipe = {
        "method": "difference",
        "form": f"{role}-adapter",
        "checkpoint": checkpoint.resolve().name,
        "adapter": adapter.resolve().name,
        "adapter_sha256": hashlib.sha256((adapter / WEIGHTS_FILE).read_bytes()).hexdigest(),
        **(degradation_of(adapter) if role == "degraded" else {}),
    }
    return _with_scope(Difference(base, lora_weights, tuple(energies), recipe), scope)


def _with_scope(difference: Difference, scope: Scope) -> Difference:
    recipe = {
        **difference.recipe,
        "layers": None if scope.layers is None else list(scope.layers),
        "sites": None if scope.endings is None else list(scope.endings),
        "energy": [
            {"layer": row.layer, "norm": row.norm, "captured": row.captured}
            for row in difference.by_layer()
        ],
    }
    return replace(difference, recipe=recipe)


def as_family(
    difference: Difference,
    name: str,
    *,
    bounds: tuple[float, float] = (0.0, 3.0),
    dtype: torch.dtype | None = None,
) -> Family:
    """The difference as a family, its captured energy in the recipe.

    `dtype=None` stores a LoRA without loss (see adapter.fold_scaling) and the SVD's float32.
    Errors: those of `family.make_family`.
    """
    return make_family(
        name,
        difference.base,
        difference.lora_weights,
        bounds=bounds,
        recipe={**difference.recipe, "dtype": None if dtype is None else str(dtype)[6:]},
        dtype=dtype,
    )
