"""Search for evaluated prompts that were also used to make the family or to calibrate a tenant.

Recipes and calibration records hold digests and sketches of the prompts that were used. Torch-free.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from safegene_vllm.evaluation.results import Overlap
from safegene_vllm.evaluation.runner import PromptSet
from safegene_vllm.evaluation.targets import Target, profile_of
from safegene_vllm.evaluation.tasks import Task
from safegene_vllm.formats.family import FamilyHeader
from safegene_vllm.prompt_sketch import (
    MIN_JACCARD,
    UsedPrompts,
    digest_of_prompt,
    minhash,
    read_sketches,
    similarity,
)

MAX_ALIKE = 0.25
"""Share of neighboring prompts of a set that are near-duplicates of each other, from which on only
the same prompts count: they share a template, such as the instruction of a task."""

Uses = dict[str, list[Any]]
"""Records of data sets by where they were used."""


def uses_of_family(recipe: Mapping[str, Any]) -> Uses:
    """The data of each stage of a recipe. A recipe is free-form: other forms give nothing."""
    degradation, selection = recipe.get("degradation"), recipe.get("selection")
    found = {
        "the degradation": _records(degradation),
        "the extraction of the family": _records(recipe),
        "the selection of layers": _records(selection),
    }
    return {where: records for where, records in found.items() if records}


def _records(stage: Any) -> list[Any]:
    """The records of data sets in the `data` of a stage: one, a list, or by kind."""
    data = stage.get("data") if isinstance(stage, Mapping) else None
    if isinstance(data, Mapping):
        found = [data] if "sha256" in data else list(data.values())
    else:
        found = data if isinstance(data, list) else []
    return [record for record in found if isinstance(record, Mapping) and "sha256" in record]


def uses_of(header: FamilyHeader | None, targets: Sequence[Target]) -> Uses:
    """The data of the family's recipe, and of the calibration of every tenant."""
    uses = {} if header is None else uses_of_family(header.recipe)
    for target in targets:
        profile = profile_of(target, header)
        if profile is not None and (records := _records(profile.calibration)):
            uses[f"the calibration of {target.name}"] = records
    return uses


def find_overlaps(
    uses: Uses, sets: Mapping[str, PromptSet], tasks: Sequence[Task]
) -> tuple[list[Overlap], list[str]]:
    """Overlaps of sets and tasks with `uses`, and the uses whose prompts are not recorded."""
    evaluated: list[tuple[Literal["set", "task"], str, list[str]]] = [
        *(("set", name, chosen.prompts) for name, chosen in sets.items()),
        *(("task", task.name, [row.prompt for row in task.data.rows]) for task in tasks),
    ]
    overlaps: list[Overlap] = []
    unknown: list[str] = []
    for where, records in uses.items():
        used = read_sketches(records)
        if used is None:
            unknown.append(where)
            continue
        for kind, name, prompts in evaluated:
            if (found := _overlap(used, prompts)) != (0, 0):
                overlaps.append(Overlap(name, kind, where, len(prompts), *found, used.complete))
    return overlaps, unknown


def _overlap(used: UsedPrompts, prompts: Sequence[str]) -> tuple[int, int]:
    """(the same after normalization, near-duplicates) of `prompts`."""
    found = [used.matches(prompt) for prompt in prompts]
    near = 0 if _share_a_template(prompts) else found.count("near")
    return found.count("exact"), near


def _share_a_template(prompts: Sequence[str]) -> bool:
    distinct = list({digest_of_prompt(prompt): prompt for prompt in prompts}.values())
    signatures = [minhash(prompt) for prompt in distinct]
    alike = [similarity(a, b) >= MIN_JACCARD for a, b in itertools.pairwise(signatures)]
    return len(alike) > 1 and sum(alike) > MAX_ALIKE * len(alike)
