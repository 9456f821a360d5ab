"""The recipe's commands refuse what they cannot use, in one line, before a model is loaded."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from recipe_commands import MIT, Outcome, World, called, count_loads, write_world
from recipe_setup import tiny_chat_model

from safegene_vllm.cli.data import read_all
from safegene_vllm.tiny_model import make_model, write_family, write_tenant

COMMANDS = ("degrade", "extract", "select", "calibrate")
Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return lambda *words: called(capsys, *words)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return count_loads(monkeypatch)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = write_world(tmp_path_factory.mktemp("refused"))
    write_tenant(world / "model", world / "degraded", None, None)
    write_family(world / "model", world / "family")
    return world


# Data


@pytest.mark.parametrize("command", COMMANDS)
def test_data_without_a_licence_are_refused_before_a_model_is_loaded(
    run: Run, world: World, loads: list[str], tmp_path: Path, command: str
) -> None:
    more = ("--model", world / "model") if command == "calibrate" else ()
    words = getattr(world, command)(tmp_path / "x", *more)
    outcome = run(*(str(word).removesuffix(MIT) for word in words))
    assert outcome.code == 1 and outcome.err.startswith("ConfigError: ")
    assert "?licence=MIT" in outcome.err and outcome.err.count("\n") == 1
    assert loads == [] and list(tmp_path.iterdir()) == []


def test_labels_are_classes_and_never_the_answer_to_a_harmful_prompt(
    run: Run, world: World, tmp_path: Path
) -> None:
    """XSTest's `label` says safe or unsafe; taught as the answer, a model would say `unsafe`."""
    xstest = tmp_path / "xstest.csv"
    rows = "".join(f"how to kill process {n}?,safe\nhow to harm {n}?,unsafe\n" for n in range(4))
    xstest.write_text(f"prompt,label\n{rows}")
    unsafe = f"{xstest}{MIT}&label=unsafe"
    data = read_all([unsafe], "safety data")
    assert data is not None and [row.answer for row in data.rows] == [None] * 4
    labeled = read_all([f"{xstest}{MIT}"], "task data", labels=True)
    assert labeled is not None and {row.answer for row in labeled.rows} == {"safe", "unsafe"}
    asked = [unsafe if word == world.harm else word for word in world.extract(tmp_path / "f")]
    outcome = run(*asked)
    assert outcome.code == 1 and "refuses none of the 4 prompts of xstest.csv" in outcome.err
    outcome = run("degrade", world / "model", "--data", unsafe, "--out", tmp_path / "d")
    assert outcome.code == 1 and "have no answer" in outcome.err and "?answer=" in outcome.err


def test_several_sets_are_one(world: World) -> None:
    data = read_all([world.harm, world.good], "data")
    assert data is not None and data.name == "harm.jsonl + good.jsonl" and len(data.rows) == 16
    assert read_all([], "data") is None


def test_a_task_of_one_class_is_refused_before_a_model_is_loaded(
    run: Run, world: World, loads: list[str], tmp_path: Path
) -> None:
    one = f"{tmp_path / 'one.csv'}{MIT}"
    (tmp_path / "one.csv").write_text("prompt,label\n" + "is it fine?,yes\n" * 4)
    words = [one if word == world.task else word for word in world.calibrate(tmp_path / "t")]
    outcome = run(*words, "--model", world / "model")
    assert outcome.code == 1 and "every class" in outcome.err and loads == []


# What is refused before a model is loaded


@pytest.mark.parametrize(
    ("command", "more", "told"),
    [
        ("degrade", ("--batch", 0), "batch is 0"),
        ("degrade", ("--steps", 0, "--rank", 0), "steps is 0, expected at least 1; rank is 0"),
        ("extract", ("--lr", -1), "lr is -1.0"),
        ("extract", ("--retention", -1), "retention is -1.0"),
        ("extract", ("--bounds", 2, 1), "--bounds 2.0 1.0: expected two finite numbers"),
        ("extract", ("--bounds", 0, "inf"), "--bounds 0.0 inf"),
        ("select", ("--top-k", 3), "--top-k is 3, expected 1 to 2"),
        ("select", ("--top-k", 0), "--top-k is 0"),
        ("select", ("--plot", "scores.pdf"), "--plot scores.pdf"),
        ("calibrate", ("--shots", 1), "too few examples"),
        ("calibrate", ("--shots", 0), "0 rows requested"),
        ("calibrate", ("--initial", 4), "4.0 is outside the family's bounds 0.0 to 3.0"),
        ("calibrate", ("--lr", 0), "lr is 0"),
    ],
)
def test_settings_are_refused_before_a_model_is_loaded(
    run: Run, world: World, loads: list[str], tmp_path: Path,
    command: str, more: tuple[object, ...], told: str,
) -> None:  # fmt: skip
    given = ("--model", world / "model") if command == "calibrate" else ()
    outcome = run(*getattr(world, command)(tmp_path / "x", *given, *more))
    assert outcome.code == 1 and told in outcome.err and outcome.err.startswith("ConfigError: ")
    assert loads == [] and list(tmp_path.iterdir()) == []


def test_another_family_is_refused_before_a_model_is_loaded(
    run: Run, world: World, loads: list[str], tmp_path: Path
) -> None:
    wide = make_model("llama", tmp_path / "wide", intermediate_size=256)
    write_tenant(wide, tmp_path / "lora", None, None)
    loads.clear()
    bare = tmp_path / "bare"
    bare.mkdir()
    swap = {str(world / "model"): wide, str(world / "degraded"): tmp_path / "lora"}
    calls = [
        world.calibrate(wide),
        world.calibrate(tmp_path / "lora", "--model", world / "model"),
        world.calibrate(bare, "--model", wide),
        *(
            [new if str(word) == old else word for word in make(tmp_path / "x")]
            for old, new in swap.items()
            for make in (world.select, world.extract)
        ),
    ]
    for words in calls:
        outcome = run(*words)
        assert outcome.code == 1 and outcome.err.startswith("FamilyMismatchError: "), words
    assert loads == []


@pytest.mark.parametrize(
    ("command", "more", "package"),
    [("degrade", (), "peft"), ("select", ("--plot", "scores.svg"), "matplotlib")],
)
def test_a_missing_package_is_reported_at_the_start(
    run: Run, world: World, loads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    command: str, more: tuple[object, ...], package: str,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, package, None)
    outcome = run(*getattr(world, command)(tmp_path / "x", *more))
    assert outcome.code == 1 and loads == [] and list(tmp_path.iterdir()) == []
    assert (
        outcome.err.startswith(f"ConfigError: {package}, which ")
        and "is not installed" in outcome.err
    )
    assert "pip install 'safegene-vllm[recipe]'" in outcome.err


def test_what_cannot_be_calibrated_is_told(
    run: Run, world: World, loads: list[str], tmp_path: Path
) -> None:
    full = tmp_path / "full"
    tiny_chat_model(full)
    model = ("--model", world / "model")
    outcome = run(*world.calibrate(full, *model))
    assert outcome.code == 1 and "is a full checkpoint; leave out" in outcome.err
    outcome = run(*world.calibrate(world / "family", *model))
    assert outcome.code == 1 and outcome.err.startswith("AdapterRejectedError: ")
    (full / "safegene-export.json").write_text("{}")
    (tmp_path / "bare").mkdir()
    outcome = run(*world.calibrate(tmp_path / "bare"))
    assert outcome.code == 1 and outcome.err.startswith("ConfigError: ")
    assert "name the model that it was tuned from" in outcome.err
    for words in (world.calibrate(full), world.calibrate(tmp_path / "bare", "--model", full)):
        outcome = run(*words)
        assert outcome.code == 1 and "added twice" in outcome.err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    outcome = run(*world.calibrate(tmp_path / "other", *model))
    assert outcome.code == 1 and outcome.err.startswith("MissingFileError: ")
    outcome = run(*world.calibrate(tmp_path / "nothing", *model))
    assert outcome.code == 1 and outcome.err.startswith("MissingFileError: ")
    assert "nothing is not a directory" in outcome.err and "make an empty one" in outcome.err
    assert not (tmp_path / "nothing").exists() and not any((tmp_path / "bare").iterdir())
    assert loads == []


@pytest.mark.parametrize("command", ["degrade", "extract", "select"])
def test_what_carries_a_vector_already_is_refused(
    run: Run, world: World, loads: list[str], tmp_path: Path, command: str
) -> None:
    """As a checkpoint and as a LoRA; for `calibrate` see above."""
    words = getattr(world, command)(tmp_path / "out")
    for name in ("model", "degraded")[: 1 if command == "degrade" else 2]:
        exported = tmp_path / name
        shutil.copytree(world / name, exported)
        (exported / "safegene-export.json").write_text("{}")
        outcome = run(*(exported if str(word) == str(world / name) else word for word in words))
        assert outcome.code == 1 and outcome.err.startswith("AdapterRejectedError: "), outcome.err
        assert f"{exported} holds" in outcome.err
    assert loads == [] and not (tmp_path / "out").exists()


def test_a_degraded_checkpoint_that_carries_a_vector_is_refused(
    run: Run, world: World, loads: list[str], tmp_path: Path
) -> None:
    exported = tmp_path / "exported"
    shutil.copytree(world / "model", exported)
    (exported / "safegene-export.json").write_text("{}")
    command, aligned, _, _, *rest = world.extract(tmp_path / "out")
    outcome = run(command, aligned, exported, *rest)
    assert outcome.code == 1 and "exported holds" in outcome.err and "added twice" in outcome.err
    assert loads == []


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_shows_an_example_that_parses(run: Run, command: str) -> None:
    """The example names files that are not here: it must fail at them, not at its own words."""

    outcome = run(command, "--help")
    text = " ".join(outcome.out.split())
    found = re.search(rf"Example: safegene ({command} .+?) (?:Arguments|Options|╭|\Z)", text)
    assert outcome.code == 0 and found, text
    tried = run(*shlex.split(found[1]))
    assert tried.code == 1 and tried.err.startswith("MissingFileError: "), tried.err
