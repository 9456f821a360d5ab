"""Stages of a long command: stored, continued, and never mixed with those of other inputs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from safegene_vllm.errors import ConfigError
from safegene_vllm.recipe.stages import Stages

ROOT = Path(__file__).parents[2]
INPUTS = {"--safety": "80 rows of a.csv, 0f3a", "seed": 0}


def write(text: str, made: list[str]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        made.append(text)
        path.mkdir()
        (path / "x").write_text(text)

    return make


def fail(path: Path) -> None:
    raise RuntimeError(path)


def test_a_finished_stage_is_not_made_again(tmp_path: Path) -> None:
    made: list[str] = []
    for _ in range(2):
        with Stages(tmp_path / "p", INPUTS) as stages:
            assert (stages.result("one", write("1", made)) / "x").read_text() == "1"
            with pytest.raises(RuntimeError):
                stages.result("two", fail)
    with Stages(tmp_path / "p", INPUTS) as stages:
        assert list(stages.done) == ["one"]
        stages.result("two", write("2", made))
        assert made == ["1", "2"] and stages.done["two"]["digest"].startswith("sha256:")
        stages.clear()
    assert not (tmp_path / "p").exists()


def test_changed_inputs_are_named_and_not_mixed(tmp_path: Path) -> None:
    made: list[str] = []
    with Stages(tmp_path / "p", INPUTS) as stages:
        stages.result("one", write("1", made))
    other = {**INPUTS, "seed": 1, "--safety": "90 rows of a.csv, 11aa"}
    with pytest.raises(ConfigError) as caught:
        Stages(tmp_path / "p", other)
    message = str(caught.value)
    assert "--safety: 90 rows of a.csv, 11aa, was 80 rows of a.csv, 0f3a; seed: 1, was 0" in message
    assert "--restart" in message
    with Stages(tmp_path / "p", other, restart=True) as stages:
        stages.result("one", write("2", made))
    assert made == ["1", "2"]


def test_an_altered_result_is_rejected(tmp_path: Path) -> None:
    made: list[str] = []
    with Stages(tmp_path / "p", INPUTS) as stages:
        path = stages.result("one", write("1", made))
    (path / "x").write_text("altered")
    with (
        Stages(tmp_path / "p", INPUTS) as stages,
        pytest.raises(ConfigError, match="was changed after it was made"),
    ):
        stages.result("one", write("1", made))


def test_a_directory_of_others_is_never_deleted(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "mine.txt").write_text("mine")
    for restart in (False, True):
        with pytest.raises(ConfigError, match="is no unfinished run; move it away"):
            Stages(tmp_path / "p", INPUTS, restart=restart)
    assert [path.name for path in (tmp_path / "p").iterdir()] == ["mine.txt"]
    (tmp_path / "p" / "stages.json").write_text('{"stages": 3}')
    with pytest.raises(ConfigError, match="is no record of stages"):
        Stages(tmp_path / "p", INPUTS)


def test_two_processes_do_not_share_the_stages(tmp_path: Path) -> None:
    made: list[str] = []
    with Stages(tmp_path / "p", INPUTS) as stages:
        path = stages.result("one", write("1", made))
    code = (
        "import pathlib, sys\n"
        "from safegene_vllm.recipe.stages import Stages\n"
        f"with Stages(pathlib.Path({str(tmp_path / 'p')!r}), {INPUTS!r}):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as other:
        assert other.stdout is not None and other.stdin is not None
        assert other.stdout.readline() == b"held\n"
        for restart in (False, True):
            with pytest.raises(ConfigError, match="is in use by another run"):
                Stages(tmp_path / "p", INPUTS, restart=restart)
        assert path.exists()
        other.stdin.close()
    with Stages(tmp_path / "p", INPUTS) as stages:
        assert list(stages.done) == ["one"]
