"""A report: one HTML page about one or more evaluations, that needs nothing else to be read.

Checks that family and profiles are those that were evaluated; what stands in each part is told by
the report_ modules, the plots by plots. Torch-free. Equal input, equal bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safegene_vllm.errors import ConfigError, FamilyMismatchError, SafegeneError, raise_errors
from safegene_vllm.evaluation.results import Evaluation
from safegene_vllm.formats.family import FamilyHeader
from safegene_vllm.formats.file_io import replace_file
from safegene_vllm.formats.profile import Profile, check_profile
from safegene_vllm.report.merge import MergedEvaluation, merge_evaluations
from safegene_vllm.report.page import Section, page
from safegene_vllm.report.provenance import provenance_section
from safegene_vllm.report.rates import (
    attack_success,
    refusal_and_coherence,
    safety_utility,
    summary,
)
from safegene_vllm.report.samples import samples
from safegene_vllm.report.vectors import coefficients, layer_scores

TITLE = "Safety of tenants, before and after"


def named(
    evaluations: Evaluation | Sequence[Evaluation] | Mapping[str, Evaluation],
) -> dict[str, Evaluation]:
    """The evaluations by name; without names they are `evaluation 1`, `evaluation 2`, ..."""
    if isinstance(evaluations, Mapping):
        return dict(evaluations)
    several = [evaluations] if isinstance(evaluations, Evaluation) else list(evaluations)
    if len(several) == 1:
        return {"evaluation": several[0]}
    return {f"evaluation {number}": found for number, found in enumerate(several, 1)}


def _profile_faults(found: MergedEvaluation, tenant: str, profile: Profile) -> list[SafegeneError]:
    if tenant not in found.tenants:
        names = ", ".join(found.tenants) or "none"
        return [ConfigError(f"tenant {tenant!r} was not evaluated; evaluated are: {names}")]
    if found.families and profile.family not in found.families:
        return [
            FamilyMismatchError(
                f"the profile of {tenant!r} is for family {profile.family}, evaluated was "
                f"{', '.join(found.families)}; give the profile that was evaluated"
            )
        ]
    after = found.of(tenant).get("after")
    if after is not None and after.profile is not None and after.profile != profile.digest:
        return [
            ConfigError(
                f"tenant {tenant!r} was evaluated with profile {after.profile}, the one given is "
                f"{profile.digest}; give that one, or evaluate again"
            )
        ]
    return []


def check_artifacts(
    found: MergedEvaluation, family: FamilyHeader | None, profiles: Mapping[str, Profile]
) -> None:
    """Raise unless family and profiles are what was evaluated; all faults in one message.

    Errors: FamilyMismatchError, ConfigError, BoundsError.
    """
    faults: list[SafegeneError] = []
    if family is not None and found.families and family.digest not in found.families:
        faults.append(
            FamilyMismatchError(
                f"the family given is {family.name!r} {family.digest}, evaluated was "
                f"{', '.join(found.families)}; give the family that was evaluated"
            )
        )
    for tenant, profile in profiles.items():
        of_tenant = _profile_faults(found, tenant, profile)
        if not of_tenant and family is not None and profile.family == family.digest:
            try:
                check_profile(profile, family)
            except SafegeneError as error:
                of_tenant = [error]
        faults += of_tenant
    raise_errors(faults)


def _lead(found: MergedEvaluation) -> str:
    families = ", ".join(family.name for family in found.families.values())
    tenants, sets, tasks = len(found.tenants), len(found.sets), len(found.tasks)
    counts = [
        f"{count} {word}{'' if count == 1 else 's'}"
        for count, word in ((tenants, "tenant"), (sets, "prompt set"), (tasks, "task"))
        if count
    ]
    return f"{', '.join(counts) or 'Nothing measured'}{f'; family {families}' if families else ''}."


def report_page(
    evaluations: Evaluation | Sequence[Evaluation] | Mapping[str, Evaluation],
    *,
    family: FamilyHeader | None = None,
    profiles: Mapping[str, Profile] | None = None,
    title: str = TITLE,
) -> bytes:
    """The page about `evaluations`, UTF-8.

    `family` adds the scores of all layers and the recipe, `profiles` (by tenant) the calibrations.
    Errors: ConfigError if the evaluations contradict each other, or there is none; what
    `check_artifacts` raises.
    """
    found, own = merge_evaluations(named(evaluations)), dict(profiles or {})
    check_artifacts(found, family, own)
    sections = [
        Section("summary", "Summary", summary(found)),
        Section("attack-success", "Attack success", attack_success(found)),
        Section("safety-utility", "Safety against utility", safety_utility(found)),
        Section("layers", "Layers of the family", layer_scores(found, family)),
        Section("coefficients", "Coefficients per tenant", coefficients(found, own)),
        Section("refusal", "Over-refusal, benign refusal, coherence", refusal_and_coherence(found)),
        Section("samples", "Sample answers", samples(found)),
        Section("origin", "How it was made", provenance_section(found, family, own)),
    ]
    return page(title, _lead(found), sections)


def write_report(
    evaluations: Evaluation | Sequence[Evaluation] | Mapping[str, Evaluation],
    out: Path,
    *,
    family: FamilyHeader | None = None,
    profiles: Mapping[str, Profile] | None = None,
    title: str = TITLE,
) -> None:
    """Write `report_page` to the file `out`, as a whole or not at all. Errors: those of it."""
    replace_file(Path(out), report_page(evaluations, family=family, profiles=profiles, title=title))
