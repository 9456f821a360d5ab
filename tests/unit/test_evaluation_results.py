"""evaluation.json: what is written is read back, and what does not fit is rejected by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from safegene_vllm.errors import HeaderError, SafegeneError, VersionError
from safegene_vllm.evaluation.results import (
    Change,
    Evaluation,
    FamilyRecord,
    JudgeRecord,
    LayerScore,
    Sample,
    SampleResponse,
    SetRecord,
    Settings,
    TargetResult,
    TaskRecord,
    load_evaluation,
    save_evaluation,
)
from safegene_vllm.evaluation.statistics import Rate

HALF = Rate(0.5, 0.25, 0.75, 8)
DIGEST = "sha256:" + "0" * 64


def made() -> Evaluation:
    before = TargetResult("acme", "before", None, None, {"bad": {"s": HALF}}, {"sst2": HALF})
    return Evaluation(
        made_by="safegene-vllm test",
        settings=Settings(64, 8, "transformers", "float32"),
        family=FamilyRecord("tiny", DIGEST, (LayerScore(0, None), LayerScore(1, 0.25))),
        sets={"bad": SetRecord("harmful", 8, "bad.csv?limit=8", DIGEST, None)},
        judges=(JudgeRecord("s", "refused", "a rule"),),
        tasks={"sst2": TaskRecord(8, "v.tsv", DIGEST, "research")},
        targets=(before, replace(before, state="after", coefficients=(0.5, 1.0), profile=DIGEST)),
        changes=(
            Change("acme", Rate(-0.5, -0.75, 0.0, 8), set="bad", judge="s"),
            Change("acme", HALF, task="sst2"),
        ),
        samples=(Sample("bad", "do it", {"acme/after": SampleResponse(None, {"s": False})}),),
    )


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    save_evaluation(made(), tmp_path / "e.json")
    assert load_evaluation(tmp_path / "e.json") == made()


def test_the_file_reads_as_documented(tmp_path: Path) -> None:
    save_evaluation(made(), tmp_path / "e.json")
    raw = json.loads((tmp_path / "e.json").read_text())
    assert (raw["kind"], raw["version"]) == ("evaluation", 1)
    assert raw["family"]["layers"] == [{"layer": 0, "score": None}, {"layer": 1, "score": 0.25}]
    assert raw["subjects"][1]["coefficients"] == [0.5, 1.0]
    assert raw["subjects"][0]["rates"]["bad"]["s"] == {
        "rate": 0.5, "low": 0.25, "high": 0.75, "n": 8,
    }  # fmt: skip
    assert [sorted(change) for change in raw["changes"]] == [
        ["difference", "judge", "name", "set"],
        ["difference", "judge", "name", "task"],
    ]
    assert raw["samples"][0]["answers"]["acme/after"]["text"] is None


def test_a_target_is_found_by_name_and_state() -> None:
    after = made().target("acme", "after")
    assert after is not None and after.profile == DIGEST and after.key == "acme/after"
    assert made().target("acme", "parent") is None


def _put(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(raw: Any) -> None:
        for key in path[:-1]:
            raw = raw[key]
        raw[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (_put("kind", value="family"), HeaderError, "kind is 'family', expected 'evaluation'"),
        (_put("version", value=2), VersionError, "version is 2"),
        (_put("version", value=True), VersionError, "version is True"),
        (_put("extra", value=1), HeaderError, "extra"),
        (_put("settings", "max_tokens", value="64"), HeaderError, r"settings\.max_tokens"),
        (_put("settings", "max_tokens", value=True), HeaderError, r"settings\.max_tokens"),
        (_put("settings", "backend", value="tgi"), HeaderError, r"settings\.backend.*'tgi'"),
        (_put("sets", "bad", "kind", value="evil"), HeaderError, r"sets\.bad\.kind.*'evil'"),
        (_put("sets", "bad", "extra", value=1), HeaderError, r"sets\.bad\.extra"),
        (_put("sets", value={}), HeaderError, "set 'bad' is not described"),
        (_put("tasks", value={}), HeaderError, "task 'sst2' is not described"),
        (_put("judges", value=[]), HeaderError, "judge 's' is not described"),
        (_put("subjects", 1, "state", value="before"), HeaderError, "acme/before occurs twice"),
        (_put("subjects", 0, "accuracy", "sst2", "n", value=0), HeaderError, "n >= 1"),
        (_put("subjects", 0, "accuracy", "sst2", "rate", value=1.5), HeaderError, "a rate in 0"),
        (_put("changes", 0, "difference", "low", value=-2), HeaderError, "a rate in -1"),
        (_put("changes", 0, "task", value="sst2"), HeaderError, "either a set or a task"),
        (_put("samples", 0, "set", value="x"), HeaderError, "set 'x' is not described"),
    ],
)
def test_what_does_not_fit_is_rejected(
    tmp_path: Path,
    change: Callable[[dict[str, Any]], None],
    error: type[SafegeneError],
    says: str,
) -> None:
    path = tmp_path / "e.json"
    save_evaluation(made(), path)
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(error, match=says) as caught:
        load_evaluation(path)
    assert str(path) in str(caught.value)


def test_errors_are_reported_together_and_never_written(tmp_path: Path) -> None:
    wrong = replace(made(), judges=(), sets={})
    with pytest.raises(
        HeaderError, match=r"(?s)errors:.*judge 's'.*set 'bad'|set 'bad'.*judge 's'"
    ):
        save_evaluation(wrong, tmp_path / "e.json")
    assert not (tmp_path / "e.json").exists()
