"""Stages of a long command: stored, continued, and never mixed with those of other inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from safegene_vllm.errors import ConfigError
from safegene_vllm.recipe.stages import Stages

INPUTS = {"--safety": "80 rows of a.csv, 0f3a", "seed": 0}


def write(text: str, made: list[str]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        made.append(text)
        path.mkdir()
        (path / "x").write_text(text)

    return make


def test_a_finished_stage_is_not_made_again(tmp_path: Path) -> None:
    made: list[str] = []
    for _ in range(2):
        stages = Stages(tmp_path / "p", INPUTS)
        assert (stages.result("one", write("1", made)) / "x").read_text() == "1"
    with pytest.raises(RuntimeError):
        stages.result("two", lambda path: (_ for _ in ()).throw(RuntimeError))
    stages = Stages(tmp_path / "p", INPUTS)
    assert list(stages.done) == ["one"]
    stages.result("two", write("2", made))
    assert made == ["1", "2"] and stages.done["two"]["digest"].startswith("sha256:")
    stages.clear()
    assert not (tmp_path / "p").exists()


def test_changed_inputs_are_named_and_not_mixed(tmp_path: Path) -> None:
    made: list[str] = []
    Stages(tmp_path / "p", INPUTS).result("one", write("1", made))
    other = {**INPUTS, "seed": 1, "--safety": "90 rows of a.csv, 11aa"}
    with pytest.raises(ConfigError) as caught:
        Stages(tmp_path / "p", other)
    message = str(caught.value)
    assert "--safety: 90 rows of a.csv, 11aa, was 80 rows of a.csv, 0f3a; seed: 1, was 0" in message
    assert "--restart" in message
    Stages(tmp_path / "p", other, restart=True).result("one", write("2", made))
    assert made == ["1", "2"]


def test_an_altered_result_is_rejected(tmp_path: Path) -> None:
    made: list[str] = []
    path = Stages(tmp_path / "p", INPUTS).result("one", write("1", made))
    (path / "x").write_text("altered")
    with pytest.raises(ConfigError, match="was changed after it was made"):
        Stages(tmp_path / "p", INPUTS).result("one", write("1", made))


def test_a_directory_of_others_is_never_deleted(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "mine.txt").write_text("mine")
    for restart in (False, True):
        with pytest.raises(ConfigError, match="is no unfinished run; move it away"):
            Stages(tmp_path / "p", INPUTS, restart=restart)
    assert (tmp_path / "p" / "mine.txt").exists()
    (tmp_path / "p" / "stages.json").write_text('{"stages": 3}')
    with pytest.raises(ConfigError, match="is no record of stages"):
        Stages(tmp_path / "p", INPUTS)
