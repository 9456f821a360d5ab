"""Coefficients for a tenant: true gradients, bounds, the best by held-out loss, nothing changed."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_setup import GOOD, HARM, TASK, dataset, tiny_chat_model

from safegene_vllm.dataset import Dataset
from safegene_vllm.errors import ConfigError, NonFiniteError, SiteError
from safegene_vllm.formats.adapter import LoRAWeights, layer_of
from safegene_vllm.formats.family import Family, base_of_checkpoint, make_family
from safegene_vllm.formats.profile import Profile, save_profile
from safegene_vllm.recipe.calibration import (
    REFUSAL,
    Calibration,
    _split,
    calibrate,
    make_examples,
)
from safegene_vllm.recipe.difference import as_family, of_adapter
from safegene_vllm.recipe.encoding import Encoded, Example
from safegene_vllm.recipe.finetune import FineTune, fine_tune
from safegene_vllm.recipe.model import LoadedModel, layer_modules, load_model
from safegene_vllm.recipe.training import Run
from safegene_vllm.tiny_model import linear_sites, make_model, random_lora_weights, write_family

FLOAT = torch.float32
TUNE = FineTune(steps=40, lr=1e-2, batch=16)
WHOLE = Calibration(benign=1.0, retained_tokens=24)
SHORT = replace(WHOLE, steps=15)
IDS = torch.arange(3, 27).reshape(2, 12)


def trained(model: Path, out: Path, *data: Dataset) -> Path:
    examples = [Example(row.prompt, row.answer or "") for one in data for row in one.rows]
    fine_tune(model, examples, TUNE, out, dtype=FLOAT)
    return out


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("calibration")
    model = tiny_chat_model(root / "model")
    trained(model, root / "acme", TASK)
    trained(model, root / "safe", TASK, HARM)
    trained(model, root / "refuses", HARM, GOOD)
    return root


@pytest.fixture(scope="module")
def tenant(root: Path) -> LoadedModel:
    """Does its task, and completes harmful prompts with nonsense."""
    return load_model(root / "model", root / "acme", dtype=FLOAT)


@pytest.fixture(scope="module")
def helps(root: Path) -> Family:
    """A vector that refuses harm, and says little about the task."""
    return as_family(of_adapter(root / "model", root / "refuses", "aligned"), "helps")


@pytest.fixture(scope="module")
def harms(root: Path) -> Family:
    """Noise: a model that is good at everything can only get worse by it."""
    return write_family(root / "model", root / "noise")


def bounded(family: Family, low: float, high: float) -> Family:
    header = family.header
    return make_family("b", header.base, family.lora_weights, bounds=(low, high), recipe={})


def tuned(
    loaded: LoadedModel, family: Family, settings: Calibration = SHORT, **options: Any
) -> Profile:
    given = {"safety": HARM, "task": TASK, "benign": GOOD}
    return calibrate(loaded, family, settings=settings, **{**given, **options})


def written(profile: Profile, directory: Path) -> bytes:
    save_profile(profile, directory)
    return (directory / "safegene.json").read_bytes()


# The result


def test_a_vector_that_helps_gets_a_positive_coefficient(
    tenant: LoadedModel, helps: Family
) -> None:
    profile = tuned(tenant, helps, WHOLE)
    before, after = profile.calibration["before"], profile.calibration["after"]
    assert all(0.2 < value <= 3.0 for value in profile.coefficients)
    assert after["safety"] < 0.5 * before["safety"]
    assert before["task"] == pytest.approx(0.0, abs=1e-5) and 0.0 < after["task"] < 0.5
    assert profile.family == helps.digest


def test_a_vector_that_only_harms_gets_zero(root: Path, harms: Family) -> None:
    safe = load_model(root / "model", root / "safe", dtype=FLOAT)
    profile = tuned(safe, harms, replace(SHORT, steps=200, look_every=2, patience=2), benign=None)
    assert profile.coefficients == (0.0, 0.0)
    record = profile.calibration
    assert record["after"] == record["before"] and record["data"]["benign"] is None
    # It stops after as many looks without a gain as it has patience for.
    assert record["steps"] == 4 and [look["since"] for look in record["held_out"]] == [1, 2]


def test_the_best_by_held_out_loss_is_what_is_returned(tenant: LoadedModel, helps: Family) -> None:
    """Large steps overshoot, so the last coefficients are not the best ones."""
    changes = {"steps": 10, "lr": 0.9, "look_every": 2, "patience": 9}
    settings = replace(WHOLE, **changes, task=4.0, benign=3.0)
    record = tuned(tenant, helps, settings).calibration

    def total(losses: Mapping[str, float]) -> float:
        return losses["safety"] + 4.0 * losses["task"] + 3.0 * losses["benign"]

    looks = record["held_out"]
    assert [look["step"] for look in looks] == [2, 4, 6, 8, 10]
    assert all(look["total"] == pytest.approx(total(look)) for look in looks)
    best = min(total(look) for look in (record["before"], *looks))
    assert looks[-1]["total"] > best + 0.01
    assert total(record["after"]) == pytest.approx(best, abs=2e-3)


@pytest.mark.parametrize("high", [0.3, 0.12345])
def test_bounds_are_never_left(tenant: LoadedModel, helps: Family, high: float) -> None:
    settings = replace(SHORT, initial=0.1, lr=1.0, pull=0.0, task=0.0, benign=0.0)
    profile = tuned(tenant, bounded(helps, 0.0, high), settings)
    assert profile.coefficients == (high, high)


def test_bounds_without_zero_select_the_least_harm(root: Path, harms: Family) -> None:
    safe = load_model(root / "model", root / "safe", dtype=FLOAT)
    profile = tuned(safe, bounded(harms, 0.2, 0.6), replace(SHORT, initial=0.6, lr=0.001))
    assert profile.coefficients == (0.2, 0.2)
    assert profile.calibration["before"]["safety"] < profile.calibration["after"]["safety"]


def test_tied_is_one_number(tenant: LoadedModel, helps: Family) -> None:
    first, second = tuned(tenant, helps, replace(SHORT, tied=True)).coefficients
    assert first == second > 0.2
    free = tuned(tenant, helps).coefficients
    assert free[0] != free[1]


def test_layers_without_a_vector_get_nothing(tenant: LoadedModel, helps: Family) -> None:
    lora_weights = {site: lora for site, lora in helps.lora_weights.items() if layer_of(site) == 1}
    late = make_family("late", helps.header.base, lora_weights, recipe={})
    first, second = tuned(tenant, late).coefficients
    assert first == 0.0 < second


def test_the_tenant_is_not_changed_by_a_bit(tenant: LoadedModel, helps: Family) -> None:
    before = tenant.model(IDS).logits
    lora_weights = {site: lora for site, lora in helps.lora_weights.items() if layer_of(site) == 1}
    hooks = sum(len(module._forward_hooks) for module in tenant.model.modules())
    for family in (helps, make_family("late", helps.header.base, lora_weights, recipe={})):
        tuned(tenant, family, replace(SHORT, steps=3))
    assert torch.equal(tenant.model(IDS).logits, before)
    assert sum(len(module._forward_hooks) for module in tenant.model.modules()) == hooks
    assert not any("forward" in vars(layer) for layer in layer_modules(tenant.model))


def test_the_record_has_examples_settings_and_data(tenant: LoadedModel, helps: Family) -> None:
    record = tuned(tenant, helps, replace(SHORT, tied=True)).calibration
    assert record["method"] == "few-shot gradient" and len(record["losses"]) == record["steps"]
    assert record["settings"]["tied"] is True and record["settings"]["steps"] == 15
    assert record["shots"] == {"safety": 8, "task": 8, "benign": 8}
    assert record["data"]["task"] == TASK.record()


# The same again


def stop_after(step: int) -> Any:
    def progress(done: int, total: int, words: str) -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGINT)

    return progress


def test_the_seed_decides_the_bytes(tenant: LoadedModel, helps: Family, tmp_path: Path) -> None:
    first, again, other = (
        written(tuned(tenant, helps, replace(SHORT, seed=seed)), tmp_path / f"{n}")
        for n, seed in enumerate((0, 0, 1))
    )
    assert first == again != other


@pytest.mark.parametrize("step", [1, 5, 7, 15])
def test_stopped_and_taken_up_it_is_the_same_bytes(
    tenant: LoadedModel, helps: Family, tmp_path: Path, step: int
) -> None:
    run = Run(tmp_path / "state", {"x": 1})
    with pytest.raises(KeyboardInterrupt, match=f"after step {step}; run it again"):
        tuned(tenant, helps, run=run, progress=stop_after(step))
    found = tuned(tenant, helps, run=Run(tmp_path / "state", {"x": 1}))
    alone = tuned(tenant, helps)
    assert written(found, tmp_path / "a") == written(alone, tmp_path / "b")
    with pytest.raises(ConfigError, match="unfinished run"):
        tuned(tenant, helps, run=Run(tmp_path / "state", {"x": 2}))


@pytest.mark.parametrize("patience", [1, 100])
def test_a_run_stays_until_its_profile_is_written(
    root: Path, harms: Family, tmp_path: Path, patience: int
) -> None:
    """At its last step, and where it has converged before."""
    safe = load_model(root / "model", root / "safe", dtype=FLOAT)
    settings = replace(SHORT, steps=4, look_every=1, patience=patience)
    first = tuned(safe, harms, settings, run=Run(tmp_path / "state", {}))
    again = tuned(
        safe, harms, settings, run=Run(tmp_path / "state", {}),
        progress=lambda *step: pytest.fail(f"{step}"),
    )  # fmt: skip
    assert first.calibration["steps"] == (1 if patience == 1 else 4)
    assert written(first, tmp_path / "a") == written(again, tmp_path / "b")


def test_stopped_when_it_has_converged_it_does_not_continue(
    root: Path, harms: Family, tmp_path: Path
) -> None:
    safe = load_model(root / "model", root / "safe", dtype=FLOAT)
    settings = replace(SHORT, steps=100, look_every=1, patience=2)
    with pytest.raises(KeyboardInterrupt):
        tuned(safe, harms, settings, run=Run(tmp_path, {}), progress=stop_after(2))
    found = tuned(
        safe, harms, settings, run=Run(tmp_path, {}), progress=lambda *step: pytest.fail(f"{step}")
    )
    assert found.calibration["steps"] == 2


# Examples


def test_missing_completions_are_the_refusal_and_the_tenants_own(tenant: LoadedModel) -> None:
    safety = dataset(("bad", None), ("worse", "never"))
    task = dataset(*((row.prompt, None) for row in TASK.rows[:3]), ("other", "given"))
    found = make_examples(tenant, safety, task, None, SHORT)
    assert found["safety"] == [Example("bad", REFUSAL), Example("worse", "never")]
    assert found["task"] == [
        *(Example(row.prompt, "label", True) for row in TASK.rows[:3]), Example("other", "given")
    ]  # fmt: skip
    cut = make_examples(tenant, safety, task, GOOD, replace(SHORT, retained_tokens=3))
    assert cut["task"][0] == Example("task 0", "lab", False)
    assert cut["benign"] == [Example(row.prompt, "yes, it is") for row in GOOD.rows]


def test_tokens_after_the_retained_ones_do_not_count(tenant: LoadedModel, helps: Family) -> None:
    """Two tasks whose completions differ from their ninth token, and harm whose completions do."""
    ends = ("here", "there")
    tasks = [dataset(*((r.prompt, f"we were {end}") for r in TASK.rows)) for end in ends]
    for tokens, alike in ((8, True), (10, False)):
        settings = replace(SHORT, steps=2, retained_tokens=tokens)
        first, second = (tuned(tenant, helps, settings, task=task).calibration for task in tasks)
        assert (first["losses"] == second["losses"]) is alike
    safety = [dataset(*((r.prompt, f"we were {end}") for r in HARM.rows)) for end in ends]
    settings = replace(SHORT, steps=2, retained_tokens=8)
    first, second = (tuned(tenant, helps, settings, safety=one).calibration for one in safety)
    assert first["losses"] != second["losses"]


@pytest.mark.parametrize(("rows", "share", "held"), [(2, 0.25, 1), (8, 0.25, 2), (3, 0.9, 2)])
def test_what_is_held_out_is_not_trained_on(rows: int, share: float, held: int) -> None:
    given = [Encoded((n,), 1) for n in range(rows)]
    retained, out = _split(given, share, "seed")
    assert (
        len(out) == held and not set(retained) & set(out) and set(retained) | set(out) == set(given)
    )
    assert _split(given, share, "seed") == (retained, out)


# What is rejected


@pytest.mark.parametrize("kind", ["safety", "task", "benign"])
@pytest.mark.parametrize("rows", [0, 1])
def test_fewer_than_two_examples_are_rejected(
    tenant: LoadedModel, helps: Family, kind: str, rows: int
) -> None:
    few: Sequence[tuple[str, str]] = [("only", "one")] * rows
    with pytest.raises(ConfigError, match=rf"too few examples: tiny \({rows}\)"):
        tuned(tenant, helps, **{kind: dataset(*few, name="tiny")})


@pytest.mark.parametrize("initial", [-0.1, 3.5])
def test_it_starts_within_the_bounds(tenant: LoadedModel, helps: Family, initial: float) -> None:
    with pytest.raises(ConfigError, match=rf"{initial} is outside the family's bounds 0.0 to 3.0"):
        tuned(tenant, helps, replace(SHORT, initial=initial))


def test_a_vector_that_gives_no_numbers_names_the_step(tenant: LoadedModel, helps: Family) -> None:
    lora_weights = {
        s: LoRAWeights(p.a.float() * 1e19, p.b.float() * 1e19)
        for s, p in helps.lora_weights.items()
    }
    family = make_family("huge", helps.header.base, lora_weights, recipe={})
    with pytest.raises(NonFiniteError, match="the loss is nan at step 1"):
        tuned(tenant, family)


def test_a_family_of_another_architecture_is_rejected(tenant: LoadedModel, root: Path) -> None:
    phi = make_model("phi3", root / "phi")
    lora_weights = random_lora_weights(linear_sites(phi), 2, 1)
    with pytest.raises(SiteError, match="another architecture"):
        tuned(tenant, make_family("phi", base_of_checkpoint(phi), lora_weights, recipe={}))


@pytest.mark.parametrize(
    "name", ["steps", "batch", "look_every", "retained_tokens", "lr", "held_out"]
)
def test_settings_out_of_range_are_rejected_at_once(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 0"):
        Calibration(**{name: 0})
