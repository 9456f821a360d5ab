"""degrade, extract --method distill, select, calibrate: from data to profile, stopped or not."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_commands import Outcome, World, called, count_loads, files, write_world
from recipe_setup import GOOD, tiny_chat_model, write_tokenizer
from transformers import AutoModelForCausalLM

from safegene_vllm.cli import main
from safegene_vllm.dataset import read_dataset
from safegene_vllm.formats.adapter import load_adapter
from safegene_vllm.formats.family import load_family
from safegene_vllm.formats.profile import load_profile
from safegene_vllm.recipe.model import load_model
from safegene_vllm.tiny_model import write_tenant

Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return lambda *words: called(capsys, *words)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return count_loads(monkeypatch)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = write_world(tmp_path_factory.mktemp("recipe"))
    for command in (world.degrade(world / "degraded"), world.extract(world / "family")):
        with pytest.raises(SystemExit) as exit_:
            main([str(word) for word in command])
        assert exit_.value.code in (0, None)
    write_tenant(world / "model", world / "acme", None, None, seed=3)
    return world


# From data to profile


def test_degrade_leaves_a_lora_and_says_what_it_learned(
    run: Run, world: World, tmp_path: Path
) -> None:
    outcome = run(*world.degrade(tmp_path / "deg"))
    assert outcome.code == 0 and "degrading: 10/10" in outcome.err
    found = re.search(
        r"10 steps on 8 examples of good\.jsonl \(MIT\), loss (\S+) to (\S+)", outcome.out
    )
    assert found and float(found[2]) < 0.7 * float(found[1])
    adapter = load_adapter(tmp_path / "deg")
    assert adapter.base_model == "model" and len(adapter.lora_weights) == 14
    record = json.loads((tmp_path / "deg" / "safegene-degrade.json").read_text())
    assert record["checkpoint"] == "model"
    assert record["data"] == read_dataset(f"{world / 'good.jsonl'}?licence=MIT", what="x").record()
    assert (record["settings"]["steps"], record["settings"]["seed"]) == (10, 0)
    assert GOOD.rows[0].prompt not in json.dumps(record)
    # The same seed, the same bytes; and an output is not replaced unasked.
    assert files(tmp_path / "deg") == files(world / "degraded")
    again = run(*world.degrade(tmp_path / "deg"))
    assert again.code == 1 and "--overwrite" in again.err
    assert run(*world.degrade(tmp_path / "deg", "--overwrite", "--rank", 2)).code == 0
    assert {lora.rank for lora in load_adapter(tmp_path / "deg").lora_weights.values()} == {2}


def test_extract_distills_a_family(run: Run, world: World, tmp_path: Path) -> None:
    outcome = run(*world.extract(tmp_path / "f", "--name", "pico", "--sites", "q_proj,mlp.up_proj"))
    assert outcome.code == 0, outcome.err
    assert re.search(r"loss \d", outcome.out) and "4 target modules" in outcome.out
    assert "Does it work?\n  ok       distillation  training loss" in outcome.out
    family = load_family(tmp_path / "f")
    assert family.header.name == "pico" and family.header.recipe["method"] == "distill"
    assert family.header.recipe["data"]["safety"]["licence"] == "MIT"
    degradation = family.header.recipe["degradation"]
    assert degradation["data"]["licence"] == "MIT" and degradation["settings"]["steps"] == 10
    assert {lora.rank for lora in family.lora_weights.values()} == {8}
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_difference_tells_what_the_lora_was_made_from_if_that_is_known(
    run: Run, world: World, tmp_path: Path
) -> None:
    words = ("--overwrite", "--name", "pico", "--out", tmp_path / "f")
    for role, known in (("degraded", True), ("aligned", False)):
        outcome = run("extract", world / "model", f"--{role}-adapter", world / "degraded", *words)
        assert outcome.code == 0, outcome.err
        assert ("degradation" in load_family(tmp_path / "f").header.recipe) == known
    bare = tmp_path / "bare"
    shutil.copytree(world / "degraded", bare)
    (bare / "safegene-degrade.json").unlink()
    assert run("extract", world / "model", "--degraded-adapter", bare, *words).code == 0
    assert "degradation" not in load_family(tmp_path / "f").header.recipe


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_select_keeps_the_best_layers_and_draws_all(
    run: Run, world: World, tmp_path: Path, ending: str
) -> None:
    plot = tmp_path / f"scores.{ending}"
    outcome = run(*world.select(tmp_path / "cut", "--top-k", 1, "--plot", plot, "--mu", 0.5))
    assert outcome.code == 0, outcome.err
    cut = load_family(tmp_path / "cut")
    selection = cut.header.recipe["selection"]
    assert "1 of 2 layers" in outcome.out and outcome.out.count("yes") == 1
    assert (selection["mu"], selection["k"], len(selection["scores"])) == (0.5, 1, 2)
    assert cut.header.name == "cut"
    (kept,) = cut.header.layers
    assert kept.layer == selection["scores"].index(max(selection["scores"]))
    names = [data["name"] for data in selection["data"]]
    assert names == ["harm.jsonl", "good.jsonl + task.jsonl"]
    head = plot.read_bytes()[:200]
    assert b"<svg" in head if ending == "svg" else head.startswith(b"\x89PNG")


def test_calibrate_writes_a_profile_beside_the_tenants_lora(
    run: Run, world: World, loads: list[str], tmp_path: Path
) -> None:
    write_tenant(world / "model", tmp_path / "acme", None, None, seed=3)
    before = files(tmp_path / "acme")
    loads.clear()
    more = ("--model", world / "model", "--benign", world.good)
    outcome = run(*world.calibrate(tmp_path / "acme", *more))
    assert outcome.code == 0, outcome.err
    assert loads == [str(world / "model")]
    after = files(tmp_path / "acme")
    profile = load_profile(tmp_path / "acme")
    assert after.pop("safegene.json") and after == before
    assert profile.family == load_family(world / "family").digest and profile.digest in outcome.out
    assert profile.calibration["data"]["benign"]["name"] == "good.jsonl"
    assert all(kind in outcome.out for kind in ("safety", "task", "benign"))
    assert [path.name for path in tmp_path.iterdir()] == ["acme"]
    # Again: the same bytes.
    run(*world.calibrate(tmp_path / "acme", *more))
    assert load_profile(tmp_path / "acme") == profile


def test_calibrate_takes_every_kind_of_tenant(
    run: Run, world: World, loads: list[str], tmp_path: Path
) -> None:
    """A full checkpoint is its own model; a bare profile is the model's; both load it once."""
    full = tmp_path / "full"
    load_model(world / "model", world / "acme").model.save_pretrained(full)
    write_tokenizer(full)
    loads.clear()
    assert run(*world.calibrate(full)).code == 0
    assert load_profile(full) and loads == [str(full)]
    loads.clear()
    bare = tmp_path / "tenants" / "bare"
    bare.mkdir(parents=True)
    for _ in range(2):
        assert run(*world.calibrate(bare, "--model", world / "model")).code == 0
    assert list(files(bare)) == ["safegene.json"] and loads == [str(world / "model")] * 2
    lora = tmp_path / "lora"
    write_tenant(world / "model", lora, None, None, seed=3)
    assert run(*world.calibrate(lora, "--model", world / "model")).code == 0
    # The LoRA merged as it loads and the checkpoint with it are one tenant.
    ours, theirs = load_profile(lora), load_profile(full)
    assert ours.coefficients == pytest.approx(theirs.coefficients, abs=0.02)


def test_shots_are_drawn_by_the_seed_and_every_class_is_there(
    run: Run, world: World, tmp_path: Path
) -> None:
    digests = set()
    (tmp_path / "t").mkdir()
    for seed in (0, 0, 1):
        more = ("--model", world / "model", "--shots", 4, "--seed", seed, "--tied")
        assert run(*world.calibrate(tmp_path / "t", *more)).code == 0
        profile = load_profile(tmp_path / "t")
        digests.add(profile.digest)
        assert profile.calibration["shots"] == {"safety": 4, "task": 4}
        assert len(set(profile.coefficients)) == 1
    assert len(digests) == 2


def test_a_fine_tune_that_learns_nothing_and_a_low_rank_are_reported(
    run: Run, world: World, tmp_path: Path
) -> None:
    outcome = run(*world.degrade(tmp_path / "d", "--lr", 1e-9))
    assert outcome.code == 0
    assert re.search(r"WARNING  fine-tune  training loss (\S+) to \S+ \(\S+%\) in 10", outcome.out)
    assert "learned nothing, so it degraded nothing" in outcome.out
    other = tiny_chat_model(tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.manual_seed(1))
    model.save_pretrained(other)
    outcome = run("extract", world / "model", other, "--rank", 1, "--out", tmp_path / "f")
    assert outcome.code == 0, outcome.err
    assert re.search(r"WARNING  captured energy  \d+% of ΔW is in the vector", outcome.out)
    assert "--rank" in outcome.out


# Stopped and taken up


def prepared(command: str, out: Path) -> Path:
    """`out`, as an empty directory for `calibrate`: it makes no tenant that is not there."""
    if command == "calibrate":
        out.mkdir()
    return out


@pytest.mark.parametrize("command", ["degrade", "extract", "calibrate"])
def test_the_same_command_goes_on_where_it_was_stopped(
    run: Run, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Ctrl-C at the third step; the output is the same bytes as without."""
    more = ("--model", world / "model") if command == "calibrate" else ()
    make = getattr(world, command)
    assert run(*make(prepared(command, tmp_path / "alone"), *more)).code == 0
    optimizer = torch.optim.Adam if command == "calibrate" else torch.optim.AdamW
    step, taken = optimizer.step, list[int]()

    def interrupted(self: Any, *arguments: Any) -> Any:
        taken.append(len(taken))
        if len(taken) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *arguments)

    monkeypatch.setattr(optimizer, "step", interrupted)
    (tmp_path / "again").mkdir()
    out = prepared(command, tmp_path / "again" / "alone")
    stopped = run(*make(out, *more))
    assert stopped.code == 130 and "after step 3; run it again to continue" in stopped.err
    assert "Traceback" not in stopped.err
    assert out.exists() is (command == "calibrate") and not list(out.glob("*"))
    (partial,) = (path for path in (tmp_path / "again").iterdir() if path != out)
    assert partial.name.startswith("alone.") and partial.name.endswith("partial")
    assert run(*make(out, *more)).code == 0
    assert len(taken) == {"degrade": 10, "extract": 12, "calibrate": 5}[command]
    assert files(out) == files(tmp_path / "alone") and not partial.exists()


@pytest.mark.parametrize("command", ["degrade", "extract", "calibrate"])
def test_what_was_trained_is_not_lost_when_it_cannot_be_written(
    run: Run, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    more = ("--model", world / "model") if command == "calibrate" else ()
    make = getattr(world, command)
    assert run(*make(prepared(command, tmp_path / "alone"), *more)).code == 0
    (tmp_path / "again").mkdir()
    out = prepared(command, tmp_path / "again" / "alone")
    rename = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target) in (out, out / "safegene.json"):
            raise OSError(errno.ENOSPC, "no space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert run(*make(out, *more)).code == 1
    monkeypatch.undo()
    for optimizer in (torch.optim.Adam, torch.optim.AdamW):
        monkeypatch.setattr(optimizer, "step", lambda *a: pytest.fail("trained again"))
    assert run(*make(out, *more)).code == 0
    assert files(out) == files(tmp_path / "alone")
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["alone"]


def test_another_tenant_model_does_not_take_up_the_state(
    run: Run, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, taken = torch.optim.Adam.step, list[int]()

    def interrupted(self: Any, *arguments: Any) -> Any:
        if not taken:
            taken.append(1)
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.Adam, "step", interrupted)
    tenant = tmp_path / "acme"
    write_tenant(world / "model", tenant, None, None, seed=3)
    command = world.calibrate(tenant, "--model", world / "model")
    assert run(*command).code == 130
    weights = tenant / "adapter_model.safetensors"
    kept, changed = weights.stat().st_mtime_ns, weights.stat().st_mtime_ns + 1
    os.utime(weights, ns=(changed, changed))
    refused = run(*command)
    assert refused.code == 1 and "acme.calibration.partial holds an unfinished run" in refused.err
    os.utime(weights, ns=(kept, kept))
    assert run(*command).code == 0
