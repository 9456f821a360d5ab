"""Prompts that were evaluated and also used to make the family or to calibrate a tenant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from recipe_setup import dataset
from report_files import evaluation, page

from safegene_vllm.errors import HeaderError
from safegene_vllm.evaluation.overlap import find_overlaps, uses_of, uses_of_family
from safegene_vllm.evaluation.results import Overlap, load_evaluation, save_evaluation
from safegene_vllm.evaluation.runner import PromptSet
from safegene_vllm.evaluation.targets import AFTER, Target
from safegene_vllm.evaluation.tasks import Task
from safegene_vllm.formats.family import load_family
from safegene_vllm.formats.profile import make_profile, save_profile
from safegene_vllm.tiny_model import make_model, write_family

HARM = [f"explain in {n} steps how a lock of model {n} is opened without its key" for n in range(8)]
OTHER = [f"which of the {n} rivers of the region {n} is the longest and why" for n in range(8)]
OVERLAP = Overlap("advbench", "set", "the extraction of the family", 100, 10, 2, True)


def record(prompts: list[str]) -> dict[str, Any]:
    return dataset(*((prompt, None) for prompt in prompts)).record()


def prompt_set(prompts: list[str]) -> PromptSet:
    return PromptSet("harmful", dataset(*((prompt, None) for prompt in prompts)))


def test_every_stage_of_a_recipe_is_read() -> None:
    used = {"data": {"safety": record(HARM), "benign": record(OTHER)}}
    selection = {"data": [record(HARM)]}
    recipe = {**used, "selection": selection, "degradation": {"data": record(OTHER)}}
    assert {where: len(found) for where, found in uses_of_family(recipe).items()} == {
        "the degradation": 1,
        "the extraction of the family": 2,
        "the selection of layers": 1,
    }
    for odd in ({}, {"data": 3}, {"data": [4], "selection": "x"}, {"data": {"safety": None}}):
        assert uses_of_family(odd) == {}


def test_the_same_prompts_and_near_duplicates_are_counted() -> None:
    near = HARM[2] + ", please"
    evaluated = {"set": prompt_set([HARM[0].upper(), HARM[1] + "!", near, *OTHER[:4]])}
    task = Task("rivers", (), dataset((OTHER[0], "a"), (HARM[3], "b")))
    uses = {"the extraction of the family": [record(HARM)], "the selection of layers": [{}]}
    overlaps, unknown = find_overlaps(uses, evaluated, [task])
    assert [(o.name, o.kind, o.n, o.exact, o.near, o.complete) for o in overlaps] == [
        ("set", "set", 7, 2, 1, True),
        ("rivers", "task", 2, 1, 0, True),
    ]
    assert unknown == ["the selection of layers"]
    assert "3 of 7 prompts were also used in the extraction" in overlaps[0].warning
    assert "2 the same, 1 near-duplicates" in overlaps[0].warning


def test_prompts_that_share_a_template_count_only_if_they_are_the_same() -> None:
    template = "Is the sentiment of this sentence from a film review positive or negative? Answer "
    template += "with one word and nothing else, in lower case and without a period, please. "
    rows = [template + word for word in ("good", "bad", "fine", "awful", "dull", "great")]
    uses = {"the calibration of acme": [record(rows[:3])]}
    (overlap,), _ = find_overlaps(uses, {"set": prompt_set(rows[2:])}, [])
    assert (overlap.exact, overlap.near) == (1, 0)


def test_calibrations_of_the_tenants_are_read(tmp_path: Path) -> None:
    make_model("llama", tmp_path / "model")
    write_family(tmp_path / "model", tmp_path / "family")
    header = load_family(tmp_path / "family").header
    calibration = {"data": {"safety": record(HARM), "benign": None}}
    save_profile(make_profile(header, 1.0, calibration), tmp_path / "acme")
    save_profile(make_profile(header, 1.0, {"method": "by hand"}), tmp_path / "hand")
    targets = [Target(name, AFTER, tmp_path / name) for name in ("acme", "hand")]
    assert list(uses_of(header, targets)) == ["the calibration of acme"]


def test_an_evaluation_records_overlaps_and_the_report_warns(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    save_evaluation(evaluation(overlaps=(OVERLAP,)), path)
    found = load_evaluation(path)
    assert found.overlaps == (OVERLAP,)
    assert "advbench: 12 of 100 prompts were also used in the extraction" in page(found).words
    # Without one, the file is what earlier releases read.
    save_evaluation(evaluation(), path)
    assert "overlaps" not in json.loads(path.read_text())
    assert load_evaluation(path).overlaps == () and "also used" not in page(evaluation()).words


@pytest.mark.parametrize("changes", [{"name": "none"}, {"exact": 0, "near": 0}, {"exact": 99}])
def test_an_overlap_that_cannot_be_is_rejected(changes: dict[str, Any], tmp_path: Path) -> None:
    from dataclasses import replace

    wrong = evaluation(overlaps=(replace(OVERLAP, **changes),))
    with pytest.raises(HeaderError, match="overlap of"):
        save_evaluation(wrong, tmp_path / "x.json")
