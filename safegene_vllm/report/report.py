"""Self-contained HTML report about one or more evaluations. Torch-free; equal input, equal bytes.

Checks first that the family and the profiles given are those that were evaluated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safegene_vllm import __version__
from safegene_vllm.errors import ConfigError, FamilyMismatchError, SafegeneError, raise_errors
from safegene_vllm.evaluation.results import Evaluation
from safegene_vllm.formats.family import FamilyHeader
from safegene_vllm.formats.file_io import replace_file
from safegene_vllm.formats.profile import Profile, check_profile
from safegene_vllm.report import sections
from safegene_vllm.report.measures import measures
from safegene_vllm.report.merge import MergedEvaluation, merge_evaluations
from safegene_vllm.report.page import render

TITLE = "Safety of tenants, before and after"

Evaluations = Evaluation | Sequence[Evaluation] | Mapping[str, Evaluation]


def _named(evaluations: Evaluations) -> dict[str, Evaluation]:
    """The evaluations by name; without names they are `evaluation 1`, `evaluation 2`, ..."""
    if isinstance(evaluations, Mapping):
        return dict(evaluations)
    several = [evaluations] if isinstance(evaluations, Evaluation) else list(evaluations)
    if len(several) == 1:
        return {"evaluation": several[0]}
    return {f"evaluation {number}": one for number, one in enumerate(several, 1)}


def _profile_errors(
    merged: MergedEvaluation, family: FamilyHeader | None, tenant: str, profile: Profile
) -> list[SafegeneError]:
    if tenant not in merged.tenants:
        names = ", ".join(merged.tenants) or "none"
        return [ConfigError(f"tenant {tenant!r} was not evaluated; evaluated are: {names}")]
    if merged.families and profile.family not in merged.families:
        return [
            FamilyMismatchError(
                f"the profile of {tenant!r} is for family {profile.family}, evaluated was "
                f"{', '.join(merged.families)}; give the profile that was evaluated"
            )
        ]
    after = merged.states_of(tenant).get("after")
    if after is not None and after.profile is not None and after.profile != profile.digest:
        return [
            ConfigError(
                f"tenant {tenant!r} was evaluated with profile {after.profile}, the one given is "
                f"{profile.digest}; give that one, or evaluate again"
            )
        ]
    if family is not None and profile.family == family.digest:
        try:
            check_profile(profile, family)
        except SafegeneError as error:
            return [error]
    return []


def check_artifacts(
    merged: MergedEvaluation, family: FamilyHeader | None, profiles: Mapping[str, Profile]
) -> None:
    """Check that family and profiles are those that were evaluated; all errors in one message.

    Errors: FamilyMismatchError, ConfigError, BoundsError.
    """
    errors: list[SafegeneError] = []
    if family is not None and merged.families and family.digest not in merged.families:
        errors.append(
            FamilyMismatchError(
                f"the family given is {family.name!r} {family.digest}, evaluated was "
                f"{', '.join(merged.families)}; give the family that was evaluated"
            )
        )
    for tenant, profile in profiles.items():
        errors += _profile_errors(merged, family, tenant, profile)
    raise_errors(errors)


def _lead(merged: MergedEvaluation) -> str:
    families = ", ".join(family.name for family in merged.families.values())
    counts = [
        f"{len(found)} {word}{'' if len(found) == 1 else 's'}"
        for found, word in (
            (merged.tenants, "tenant"),
            (merged.sets, "prompt set"),
            (merged.tasks, "task"),
        )
        if found
    ]
    return f"{', '.join(counts) or 'Nothing measured'}{f'; family {families}' if families else ''}."


def report_page(
    evaluations: Evaluations,
    *,
    family: FamilyHeader | None = None,
    profiles: Mapping[str, Profile] | None = None,
    title: str = TITLE,
) -> bytes:
    """The page about `evaluations`, UTF-8.

    `family` adds the scores of all layers and the recipe, `profiles` (by tenant) the calibrations.
    Errors: ConfigError if the evaluations contradict each other, or there is none; those of
    `check_artifacts`.
    """
    merged, profiles = merge_evaluations(_named(evaluations)), dict(profiles or {})
    check_artifacts(merged, family, profiles)
    main = measures(merged, "attack", "accuracy", "over_refusal")
    regressions = measures(merged, "over_refusal", "refusal", "harm", "coherence")
    every = {t: sections.rates_table(merged, t, measures(merged)) for t in merged.tenants}
    return render(
        title=title,
        lead=_lead(merged),
        version=__version__,
        merged=merged,
        header=family,
        calibrations={name: p.calibration for name, p in profiles.items() if p.calibration},
        summary={t: sections.rates_table(merged, t, main) for t in merged.tenants},
        parent_rates=sections.parent_table(merged),
        terms=sections.terms(merged),
        attack_plots=sections.rates_plots(merged, measures(merged, "attack")),
        utility_plots=sections.utility_plots(merged),
        families=sections.layer_scores(merged, family),
        coefficients=sections.coefficients(merged, profiles),
        refusal_plots=sections.rates_plots(merged, regressions),
        all_rates={tenant: table for tenant, table in every.items() if table is not None},
        provenance=sections.provenance(merged, family),
    )


def write_report(
    evaluations: Evaluations,
    out: Path,
    *,
    family: FamilyHeader | None = None,
    profiles: Mapping[str, Profile] | None = None,
    title: str = TITLE,
) -> None:
    """Write `report_page` to the file `out`, as a whole or not at all. Errors: those of it."""
    replace_file(Path(out), report_page(evaluations, family=family, profiles=profiles, title=title))
