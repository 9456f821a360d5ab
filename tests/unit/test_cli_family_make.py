"""family make and tenant protect: one command each, resumable, and honest about the result."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_commands import MIT, Outcome, called, count_loads, files
from recipe_setup import tiny_chat_model

from safegene_vllm.cli import main
from safegene_vllm.composition import delta
from safegene_vllm.evaluation.overlap import uses_of_family
from safegene_vllm.formats.adapter import load_adapter
from safegene_vllm.formats.family import load_family
from safegene_vllm.formats.profile import load_profile
from safegene_vllm.prompt_sketch import part_of, read_sketches
from safegene_vllm.recipe.family_recipe import mean_of_tenants
from safegene_vllm.tiny_model import write_family, write_tenant

Run = Callable[..., Outcome]
ROWS = 24


@dataclass(frozen=True)
class World:
    """A tiny model with its data; `family` was made by the command."""

    root: Path
    safety: str
    benign: str
    task: str

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    def make(self, out: Path, *more: object) -> list[object]:
        return ["family", "make", self / "model", "--safety", self.safety, "--benign", self.benign,
                "--out", out, "--degrade-steps", 5, "--distill-steps", 6,
                "--degrade-lr", 1e-2, *more]  # fmt: skip

    def protect(self, adapter: Path, *more: object) -> list[object]:
        return ["tenant", "protect", adapter, "--family", self / "family", "--safety", self.safety,
                "--task", self.task, "--steps", 5, *more]  # fmt: skip


def prompts(kind: str) -> list[str]:
    return [f"{kind} {n} of all" for n in range(ROWS)]


def write_rows(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"{path}{MIT}"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return lambda *words: called(capsys, *words)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return count_loads(monkeypatch)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("make")
    tiny_chat_model(root / "model")
    safety = [{"prompt": prompt, "answer": "no, sorry"} for prompt in prompts("bad")]
    benign = [{"prompt": prompt, "answer": "it is so"} for prompt in prompts("good")]
    task = [{"prompt": p, "label": ("no", "yes")[n % 2]} for n, p in enumerate(prompts("task"))]
    made = World(
        root,
        write_rows(root / "safety.jsonl", safety),
        write_rows(root / "benign.jsonl", benign),
        write_rows(root / "task.jsonl", task),
    )
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in made.make(made / "family")])
    assert exit_.value.code in (0, None)
    write_family(made / "model", made / "other")
    for seed, name in enumerate(("acme", "globex")):
        write_tenant(made / "model", made / name, None, None, seed=seed)
    return made


# family make


def test_one_command_makes_a_family_from_the_train_part_of_the_prompts(world: World) -> None:
    family = load_family(world / "family")
    recipe = family.header.recipe
    assert family.header.name == "family" and len(family.header.layers) == 1
    assert recipe["method"] == "distill" and recipe["selection"]["k"] == 1
    assert recipe["degradation"]["settings"]["steps"] == 5
    uses = uses_of_family(recipe)
    assert len(uses) == 3
    every = [prompt for kind in ("bad", "good") for prompt in prompts(kind)]
    for records in uses.values():
        used = read_sketches(records)
        assert used is not None and used.complete
        assert all(part_of(p) == "train" for p in every if used.matches(p) == "exact")
    used = read_sketches(uses["the extraction of the family"])
    assert used is not None
    assert all((used.matches(p) == "exact") == (part_of(p) == "train") for p in every)
    assert not (world / "family.partial").exists()


def test_the_result_is_measured_on_held_out_prompts_and_warnings_name_numbers(
    run: Run, world: World, tmp_path: Path
) -> None:
    measured = load_family(world / "family").header.recipe["measured"]
    held_out = sum(part_of(prompt) == "held-out" for prompt in prompts("bad"))
    assert measured["held_out_rows"]["safety"] == held_out == measured["safety_rows"]
    assert set(measured["safety_loss"]) == {"aligned", "degraded", "restored"}
    outcome = run(*world.make(tmp_path / "f", "--name", "tiny", "--strict"))
    assert outcome.code == 1 and load_family(tmp_path / "f").header.name == "tiny"
    assert "Does it work?" in outcome.out and "checks failed" in outcome.out
    assert f"{ROWS - held_out} rows to train on, {held_out} held out" in outcome.out
    assert "give at least 64" in outcome.out
    # Another name is another digest, and nothing else: the same seed, the same weights.
    names = ("adapter_model.safetensors", "adapter_config.json")
    ours, theirs = files(tmp_path / "f"), files(world / "family")
    assert all(ours[name] == theirs[name] for name in names)
    again = run(*world.make(tmp_path / "f"))
    assert again.code == 1 and "--overwrite" in again.err


def test_the_same_command_continues_and_other_inputs_are_reported(
    run: Run, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, taken = torch.optim.AdamW.step, list[int]()

    def interrupted(self: Any, *arguments: Any) -> Any:
        taken.append(len(taken))
        if len(taken) == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    out = tmp_path / "family"
    stopped = run(*world.make(out))
    assert stopped.code == 130 and "after step 2; run it again to continue" in stopped.err
    assert not out.exists()
    other = run(*world.make(out, "--distill-steps", 7, "--seed", 1))
    assert other.code == 1 and "distill.steps: 7, was 6" in other.err
    assert "seed: 1, was 0" in other.err and "--restart" in other.err
    outcome = run(*world.make(out))
    assert outcome.code == 0 and "continuing after degraded" in outcome.err
    assert len(taken) == 11, "no step is repeated"
    assert files(out) == files(world / "family")
    assert [path.name for path in tmp_path.iterdir()] == ["family"]


def test_like_degrades_as_the_mean_of_the_tenants(
    run: Run, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenants = [world / "acme", world / "globex"]
    mean = mean_of_tenants(tenants)
    loaded = [load_adapter(tenant).lora_weights for tenant in tenants]
    for site, lora in mean.items():
        expected = sum(delta(one[site], 1.0) for one in loaded if site in one) / 2
        torch.testing.assert_close(delta(lora, 1.0), expected)
    rows = [{"prompt": prompt} for prompt in prompts("good")]
    benign = write_rows(tmp_path / "open.jsonl", rows)
    words = [benign if word == world.benign else word for word in world.make(tmp_path / "f")]
    rejected = run(*words)
    assert rejected.code == 1 and "have no answer" in rejected.err
    like = [word for tenant in tenants for word in ("--like", tenant)]
    assert run(*words, *like).code == 0
    degradation = load_family(tmp_path / "f").header.recipe["degradation"]
    assert [one["name"] for one in degradation["data"]["tenants"]] == ["acme", "globex"]
    full = run(*words, "--like", world / "model", "--overwrite")
    assert full.code == 1 and "expected a LoRA adapter" in full.err


def test_out_is_tried_before_a_model_is_loaded(
    run: Run, world: World, loads: list[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    for out, message in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "x", "cannot be written"),
        (tmp_path / "other", "also holds thesis.txt"),
        (world / "model", "is an input as well"),
    ):
        for words in (world.make(out, "--overwrite"), ["degrade", world / "model", "--data",
                      world.benign, "--out", out, "--overwrite"]):  # fmt: skip
            outcome = run(*words)
            assert outcome.code == 1 and message in outcome.err, outcome.err
    assert loads == []


def test_a_model_that_is_nowhere_is_reported_without_a_network(
    run: Run, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("network used"))
    for model in (tmp_path / "nowhere", "./nowhere"):
        words = [model if word == world / "model" else word for word in world.make(tmp_path / "f")]
        outcome = run(*words)
        assert outcome.code == 1 and "no such directory" in outcome.err, outcome.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--top-k", 3), "--top-k is 3, expected 1 to 2"),
        (("--bounds", 2, 1), "--bounds 2.0 1.0"),
        (("--degrade-steps", 0), "steps is 0"),
        (("--like", "nowhere"), "nowhere is not a directory"),
    ],
)
def test_settings_are_rejected_before_a_model_is_loaded(
    run: Run, world: World, loads: list[str], tmp_path: Path, more: tuple[object, ...], message: str
) -> None:
    outcome = run(*world.make(tmp_path / "f", *more))
    assert outcome.code == 1 and message in outcome.err and outcome.err.count("\n") == 1
    assert loads == [] and list(tmp_path.iterdir()) == []


# tenant protect


def test_protect_calibrates_an_adapter_on_the_base_that_it_names(
    run: Run, world: World, tmp_path: Path
) -> None:
    tenant = tmp_path / "acme"
    shutil.copytree(world / "acme", tenant)
    (tenant / "safegene.json").unlink(missing_ok=True)
    path = tenant / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": "./nowhere"}))
    outcome = run(*world.protect(tenant))
    assert outcome.code == 1 and "names the base model './nowhere'" in outcome.err
    assert "--model" in outcome.err and not (tenant / "safegene.json").exists()
    path.write_text(json.dumps({**config, "base_model_name_or_path": str(world / "model")}))
    outcome = run(*world.protect(tenant))
    assert outcome.code == 0, outcome.err
    profile = load_profile(tenant)
    assert profile.family == load_family(world / "family").digest
    used = read_sketches(d for d in profile.calibration["data"].values() if d is not None)
    assert used is not None
    found = [p for kind in ("bad", "task") for p in prompts(kind) if used.matches(p) == "exact"]
    assert len(found) == len(used.signatures)
    assert all(part_of(prompt) == "train" for prompt in found)
    assert "Does it work?" in outcome.out and "give --benign" in outcome.out
    assert run(*world.protect(tenant, "--strict")).code == 1
    # What inspect shows of it: a row per kind, no sketch, and whether it fits.
    shown = run("inspect", tenant, "--family", world / "family").out
    assert re.search(r"safety +16 +\d\S+ +\d\S+ +safety\.jsonl \(MIT\)", shown)
    assert "(family, fits)" in shown and "minhash" not in shown
    assert "fits      not checked" in run("inspect", tenant).out
    other = run("inspect", tenant, "--family", world / "other")
    assert other.code == 1 and "the profile is for family" in other.err


def test_protect_never_makes_a_tenant_of_a_profile_only(
    run: Run, world: World, loads: list[str], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    for tenant, message in (
        (tmp_path / "nothing", "nothing is not a directory"),
        (tmp_path / "empty", "no LoRA adapter and no checkpoint"),
        (world / "family", "holds: family"),
    ):
        outcome = run(*world.protect(tenant, "--model", world / "model"))
        assert outcome.code == 1 and message in outcome.err, outcome.err
    assert loads == [] and [path.name for path in tmp_path.iterdir()] == ["empty"]
    assert list((tmp_path / "empty").iterdir()) == []


def test_evaluate_warns_of_prompts_that_the_family_was_made_from(
    run: Run, world: World, tmp_path: Path
) -> None:
    def evaluate(source: str) -> Outcome:
        out = tmp_path / "evaluation.json"
        return run("evaluate", world / "model", "--family", world / "family", "--harmful",
                   f"bad={source}", "--backend", "transformers", "--max-tokens", 2, "--out", out,
                   "--overwrite")  # fmt: skip

    trained = sum(part_of(prompt) == "train" for prompt in prompts("bad"))
    outcome = evaluate(world.safety)
    assert outcome.code == 0, outcome.err
    assert f"bad: {trained} of {ROWS} prompts were also used in the extraction" in outcome.err
    found = json.loads((tmp_path / "evaluation.json").read_text())["overlaps"]
    assert {one["used_in"] for one in found} == {
        "the extraction of the family",
        "the selection of layers",
    }
    outcome = evaluate(f"{world.safety}&part=held-out")
    assert outcome.code == 0 and "also used" not in outcome.err
