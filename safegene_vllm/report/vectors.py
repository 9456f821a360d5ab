"""The parts of a report about the vector: how its layers scored, and each tenant's coefficients.

Reads what the evaluation recorded, the family's header and the profiles, if they are given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from safegene_vllm.evaluation.results import FamilyRecord, LayerScore
from safegene_vllm.formats.family import FamilyHeader
from safegene_vllm.formats.metadata import is_number
from safegene_vllm.formats.profile import Profile
from safegene_vllm.report import plots
from safegene_vllm.report.merge import MergedEvaluation
from safegene_vllm.report.page import Html, el, figure, join, table


def layer_ranges(layers: Sequence[int]) -> str:
    """`0-3, 7` for 0, 1, 2, 3, 7."""
    ranges: list[list[int]] = []
    for layer in sorted(layers):
        if ranges and layer == ranges[-1][1] + 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges) or "none"


def as_record(header: FamilyHeader) -> FamilyRecord:
    """What an evaluation would record of this family."""
    layers = tuple(LayerScore(entry.layer, entry.score) for entry in header.layers)
    return FamilyRecord(header.name, header.digest, layers)


def recipe_scores(recipe: Mapping[str, Any], num_layers: int) -> dict[int, float]:
    """All layers' scores from `selection.scores` of a recipe, a list of one number per layer.

    A recipe is free-form, so anything else means that the scores are not there: {}.
    """
    selection = recipe.get("selection")
    scores = selection.get("scores") if isinstance(selection, dict) else None
    if not isinstance(scores, list) or len(scores) != num_layers:
        return {}
    return {layer: float(score) for layer, score in enumerate(scores) if is_number(score)}


def layer_scores(found: MergedEvaluation, header: FamilyHeader | None) -> Html:
    """Per family a bar per layer, those that carry the vector filled."""
    families = dict(found.families)
    if header is not None:
        families.setdefault(header.digest, as_record(header))
    parts = []
    for digest, family in families.items():
        selected = [entry.layer for entry in family.layers]
        scores = {e.layer: e.score for e in family.layers if e.score is not None}
        known = header is not None and header.digest == digest
        every = recipe_scores(header.recipe, header.num_layers) if known and header else {}
        of = f" of {header.num_layers}" if known and header else ""
        parts.append(el("h3", family.name))
        parts.append(
            el("p", f"{len(selected)}{of} layers carry the vector: {layer_ranges(selected)}.")
        )
        if not scores and not every:
            parts.append(el("p", "The layers of this family were not scored."))
            continue
        words = "The score of each layer; the filled ones carry the vector."
        if not every:
            words = "The scores of the layers that carry the vector"
            words += "." if known else "; with --family, scores of other layers are shown as well."
        parts.append(figure(plots.layer_scores({**scores, **every}, selected), words))
    return join(*parts) if parts else el("p", "The evaluation names no family.")


def _coefficients(
    found: MergedEvaluation, profiles: Mapping[str, Profile]
) -> dict[str, dict[str, Sequence[float]]]:
    """Family digest ("" where none is named) -> tenant, or tenant and state -> coefficients."""
    by_family: dict[str, dict[str, Sequence[float]]] = {}
    for key, subject in found.subjects.items():
        if subject.coefficients is not None and any(subject.coefficients):
            name = subject.name if subject.state == "after" else f"{subject.name}, {subject.state}"
            family = by_family.setdefault(found.family_of.get(key, ""), {})
            family[name] = subject.coefficients
    for tenant, profile in profiles.items():
        by_family.setdefault(profile.family, {}).setdefault(tenant, profile.coefficients)
    return by_family


def _numbers(rows: Mapping[str, Sequence[float]]) -> Html:
    """Layers down, tenants across; layers where all are 0 are left out."""
    length = max(map(len, rows.values()))
    padded = {name: [*values, *[0.0] * (length - len(values))] for name, values in rows.items()}
    cells = [
        [str(layer), *(f"{values[layer]:.4g}" for values in padded.values())]
        for layer in range(length)
        if any(values[layer] for values in padded.values())
    ]
    made = table(["Layer", *padded], cells, class_="numbers")
    return el(
        "details", el("summary", "The coefficients in numbers"), el("div", made, class_="compact")
    )


def coefficients(found: MergedEvaluation, profiles: Mapping[str, Profile]) -> Html:
    """Per family a map of tenants and layers, and the numbers."""
    parts = []
    for digest, rows in _coefficients(found, profiles).items():
        if digest in found.families and len(found.families) > 1:
            parts.append(el("h3", found.families[digest].name))
        words = (
            "What the family's vector is multiplied with, per tenant and layer. An empty cell is "
            "0: nothing is added there."
        )
        parts.append(figure(plots.coefficients(rows), words))
        parts.append(_numbers(rows))
    return join(*parts) if parts else el("p", "No tenant has a coefficient other than 0.")
