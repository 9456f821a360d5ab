"""Inputs of a report: its family and profiles, and several evaluations merged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from format_files import tiny_family
from report_files import DIGEST, GUARD, WORDS, evaluation, page, share

from safegene_vllm.errors import BoundsError, ConfigError, FamilyMismatchError
from safegene_vllm.evaluation.results import Evaluation, FamilyRecord, LayerScore, Settings
from safegene_vllm.formats.profile import Profile, make_profile
from safegene_vllm.report.report import report_page

MARKUP = "</pre><b>&amp;"


# Family and profiles


def with_family(**changes: Any) -> tuple[Evaluation, Any, Profile]:
    """An evaluation of a real family's tenant, the family's header, the profile."""
    header = tiny_family(**changes).header
    profile = make_profile(header, {0: 0.5, 2: 1.0}, {"loss": 0.25, "note": MARKUP})
    layers = tuple(LayerScore(entry.layer, entry.score) for entry in header.layers)
    found = evaluation("acme", family=FamilyRecord(header.name, header.digest, layers))
    after = replace(found.targets[2], profile=profile.digest, coefficients=profile.coefficients)
    return replace(found, targets=(*found.targets[:2], after)), header, profile


def test_the_family_adds_all_scores_and_the_recipe() -> None:
    recipe = {"selection": {"scores": [0.25, -3.5, 4.75]}, "note": MARKUP}
    found, header, profile = with_family(recipe=recipe)
    alone = page(found).sections["layers"]
    assert "2 layers carry the vector: 0, 2" in alone and "not selected" not in alone
    shown = page(found, family=header, profiles={"acme": profile})
    assert "2 of 3 layers carry the vector" in shown.sections["layers"]
    assert "not selected" in shown.sections["layers"]
    assert "-3.5" in shown.sections["origin"] and MARKUP in shown.words.replace("\\", "")
    assert '"loss": 0.25' in shown.sections["origin"]


ODD_RECIPES: list[dict[str, Any]] = [
    {},
    {"selection": 3},
    {"selection": {"scores": [1.0]}},
    {"selection": {"scores": {}}},
]


@pytest.mark.parametrize("recipe", ODD_RECIPES)
def test_a_recipe_in_other_words_is_no_error(recipe: dict[str, Any]) -> None:
    found, header, _ = with_family(recipe=recipe)
    assert "not selected" not in page(found, family=header).sections["layers"]


def test_layers_without_scores_are_reported() -> None:
    found = evaluation(family=FamilyRecord("tiny", DIGEST, (LayerScore(1, None),)))
    assert "not scored" in page(found).sections["layers"]


def test_another_family_or_profile_is_rejected() -> None:
    found, header, profile = with_family()
    other = tiny_family(recipe={"method": "other"}).header
    with pytest.raises(FamilyMismatchError, match="family given is 'tiny'"):
        report_page(found, family=other)
    with pytest.raises(FamilyMismatchError, match=r"profile of 'acme'.*evaluated was"):
        report_page(found, profiles={"acme": make_profile(other, 1.0)})
    with pytest.raises(ConfigError, match="was evaluated with profile"):
        report_page(found, profiles={"acme": make_profile(header, 1.0)})
    with pytest.raises(ConfigError, match="'globex' was not evaluated; evaluated are: acme"):
        report_page(found, profiles={"globex": profile})
    with pytest.raises(BoundsError):
        bare = replace(found, targets=found.targets[:2])
        report_page(bare, family=header, profiles={"acme": Profile(header.digest, (9.0, 0, 0))})


def test_all_errors_are_reported_together() -> None:
    found, header, _ = with_family()
    other = tiny_family(recipe={"method": "other"}).header
    with pytest.raises(FamilyMismatchError, match="3 errors") as caught:
        profiles = {"acme": make_profile(header, 1.0), "globex": make_profile(header, 1.0)}
        report_page(found, family=other, profiles=profiles)
    assert "globex" in str(caught.value) and "evaluated with profile" in str(caught.value)


# Several evaluations


def test_two_evaluations_stand_side_by_side() -> None:
    one, two = evaluation("acme"), evaluation("globex")
    words = page({"a.json": one, "b.json": two})
    for part in ("summary", "attack-success", "safety-utility", "coefficients", "samples"):
        assert "acme" in words.sections[part] and "globex" in words.sections[part], part
    assert "a.json" in words.sections["origin"] and "b.json" in words.sections["origin"]
    assert words.sections["samples"].count("How do I do harm?") == 1


def test_a_parent_measured_twice_is_shown_once_with_a_note() -> None:
    one, two = evaluation("acme"), evaluation("globex")
    rates = {"advbench": {WORDS: share(0.04), GUARD: share(0.01)}}
    two = replace(two, targets=(replace(two.targets[0], rates=rates), *two.targets[1:]))
    words = " ".join(page([one, two]).sections["summary"].split())
    assert "parent/parent was measured more than once" in words and "up to 2.0 points" in words
    assert "measured more than once" not in page([one, evaluation("globex")]).words


def differing() -> dict[str, Evaluation]:
    """Evaluations that contradict `evaluation("acme")`, by the error about them."""
    found = evaluation("acme")
    *first, after = found.targets
    fewer = replace(found.sets["advbench"], n=99)
    judge, *others = found.judges
    return {
        r"set 'advbench' differs .* n is 99, was 100": replace(
            found, sets={**found.sets, "advbench": fewer}
        ),
        r"judge 'strings:opening' differs .* rule is 'other'": replace(
            found, judges=(replace(judge, rule="other"), *others)
        ),
        "acme/after has other coefficients": replace(
            found, targets=(*first, replace(after, coefficients=(1.0,)))
        ),
        "acme/after has other results": replace(
            found, targets=(*first, replace(after, accuracy={"task-acme": share(0.1)}))
        ),
    }


@pytest.mark.parametrize("message", differing())
def test_what_cannot_be_compared_is_rejected(message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        report_page([evaluation("acme"), differing()[message]])


def test_the_same_data_in_another_file_can_be_compared() -> None:
    one = evaluation("acme")
    moved = replace(one.sets["advbench"], source="copy.csv")
    page([one, replace(one, sets={**one.sets, "advbench": moved})])


def test_other_settings_are_noted() -> None:
    two = evaluation("globex", settings=Settings(32, 8, "transformers", "float32"))
    shown = page([evaluation("acme"), two])
    assert "different settings" in shown.sections["summary"]
    assert "transformers, float32" in shown.sections["origin"]


def test_two_families_get_a_plot_each() -> None:
    other = FamilyRecord("second", "sha256:" + "ef" * 32, (LayerScore(0, 1.0),))
    shown = page([evaluation("acme"), evaluation("globex", family=other)])
    for part in ("layers", "coefficients"):
        assert "tiny" in shown.sections[part] and "second" in shown.sections[part]
