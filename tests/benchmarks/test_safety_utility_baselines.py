"""Each baseline is its paper's formula, against the formula written out with dense matrices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from recipe_setup import pico_chat_model
from transformers import AutoModelForCausalLM

from benchmarks.safety_utility import baselines
from safegene_vllm.composition import delta
from safegene_vllm.errors import ConfigError, ShapeError, SiteError
from safegene_vllm.formats.adapter import Adapter, LoRAWeights, load_adapter, save_adapter
from safegene_vllm.tiny_model import linear_sites, random_lora_weights

SITES = {f"model.layers.{n}.mlp.up_proj": (24, 16) for n in range(3)}


def adapter(seed: int, *, rank: int = 4, scaling: float = 1.0, sites: object = None) -> Adapter:
    lora_weights = random_lora_weights(SITES if sites is None else sites, rank, seed)
    return Adapter({s: replace(p, scaling=scaling) for s, p in lora_weights.items()}, "parent", {})


def dense(lora: LoRAWeights) -> torch.Tensor:
    return delta(lora, 1.0).double()


def projector(v: torch.Tensor) -> torch.Tensor:
    """C = V Vᵀ / ‖V‖_F, written out."""
    return v @ v.T / v.norm()


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0).item()


# -- SafeLoRA --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dense", "lora"])
def test_safe_lora_is_its_formula_for_a_dense_and_a_factored_difference(form: str) -> None:
    task, aligned = adapter(1, scaling=2.0), adapter(2, rank=6, scaling=0.5)
    exact = {site: dense(lora) for site, lora in aligned.lora_weights.items()}
    repaired = baselines.safe_lora(
        task, aligned.lora_weights if form == "pair" else exact, threshold=2.0
    )
    assert repaired.changed == tuple(SITES)
    for site, lora in task.lora_weights.items():
        c = projector(exact[site])
        expected = c @ dense(lora)
        torch.testing.assert_close(
            dense(repaired.adapter.lora_weights[site]), expected, rtol=1e-5, atol=1e-6
        )
        assert repaired.similarity[site] == pytest.approx(cosine(expected, dense(lora)), abs=1e-5)


def test_safe_lora_projects_the_sites_at_or_below_the_threshold_and_no_other() -> None:
    task, aligned = adapter(1), adapter(2)
    found = baselines.similarities(task, aligned.lora_weights)
    low, middle, high = sorted(found, key=lambda site: found[site])
    repaired = baselines.safe_lora(task, aligned.lora_weights, threshold=found[middle])
    assert repaired.changed == tuple(sorted((low, middle)))
    assert torch.equal(repaired.adapter.lora_weights[high].b, task.lora_weights[high].b)
    assert not torch.equal(repaired.adapter.lora_weights[low].b, task.lora_weights[low].b)
    by_number = baselines.safe_lora(task, aligned.lora_weights, least=1)
    assert by_number.changed == (low,)


def test_safe_lora_needs_a_difference_at_every_site_of_the_tenant() -> None:
    task, aligned = adapter(1), dict(adapter(2).lora_weights)
    first, second, third = SITES
    del aligned[first]
    aligned[second] = LoRAWeights(torch.zeros(1, 16), torch.zeros(24, 1))
    aligned[third] = LoRAWeights(torch.ones(1, 16), torch.ones(8, 1))
    with pytest.raises(
        SiteError, match=rf"(?s)3 errors.*{first}.*{second}.*0/0.*{third}"
    ) as caught:
        baselines.safe_lora(task, aligned)
    assert "(8, 16)" in str(caught.value)
    with pytest.raises(ConfigError, match="least is 9"):
        baselines.safe_lora(task, adapter(2).lora_weights, least=9)


def test_a_pair_of_zeros_has_similarity_zero() -> None:
    zero = LoRAWeights(torch.ones(2, 16), torch.zeros(24, 2))
    assert baselines.similarity(zero, next(iter(adapter(2).lora_weights.values()))) == 0.0


# -- SafeMERGE -------------------------------------------------------------------------------------


def test_safe_merge_is_exact_where_similarity_is_below_the_threshold() -> None:
    task, safety, aligned = adapter(1, scaling=2.0), adapter(3, rank=2, scaling=0.5), adapter(2)
    found = baselines.similarities(task, aligned.lora_weights)
    low, middle, high = sorted(found, key=lambda site: found[site])
    repaired = baselines.safe_merge(task, safety, aligned.lora_weights, threshold=found[middle])
    assert repaired.changed == (low,)
    expected = 0.8 * dense(task.lora_weights[low]) + 0.2 * dense(safety.lora_weights[low])
    torch.testing.assert_close(
        dense(repaired.adapter.lora_weights[low]), expected, rtol=1e-5, atol=1e-6
    )
    assert repaired.adapter.lora_weights[low].rank == 6
    for site in (middle, high):
        torch.testing.assert_close(
            dense(repaired.adapter.lora_weights[site]), dense(task.lora_weights[site])
        )


def test_the_linear_merge_is_what_peft_computes_and_its_error_is_told(tmp_path: Path) -> None:
    model_dir = pico_chat_model(tmp_path / "model")
    sites = {s: d for s, d in linear_sites(model_dir).items() if s.endswith("q_proj")}
    task, safety = adapter(1, scaling=2.0, sites=sites), adapter(3, scaling=0.5, sites=sites)
    aligned = adapter(2, sites=sites)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_dir),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]),
        "task",
    )
    model.add_adapter("safety", LoraConfig(r=4, lora_alpha=2, target_modules=["q_proj"]))
    modules = dict(model.base_model.model.named_modules())
    for name, made in (("task", task), ("safety", safety)):
        for site, lora in made.lora_weights.items():
            modules[site].lora_A[name].weight.data.copy_(lora.a)
            modules[site].lora_B[name].weight.data.copy_(lora.b)
            assert modules[site].scaling[name] == lora.scaling
    model.add_weighted_adapter(["task", "safety"], [0.8, 0.2], "both", combination_type="linear")
    modules = dict(model.base_model.model.named_modules())

    repaired = baselines.safe_merge(
        task, safety, aligned.lora_weights, threshold=2.0, form="linear"
    )
    off = total = 0.0
    for site, lora in repaired.adapter.lora_weights.items():
        assert modules[site].scaling["both"] == 1.0
        torch.testing.assert_close(lora.a, modules[site].lora_A["both"].weight.data)
        torch.testing.assert_close(lora.b, modules[site].lora_B["both"].weight.data)
        exact = 0.8 * dense(task.lora_weights[site]) + 0.2 * dense(safety.lora_weights[site])
        off += (dense(lora) - exact).square().sum().item()
        total += exact.square().sum().item()
    assert repaired.notes["cross_term_error"] == pytest.approx((off / total) ** 0.5, rel=1e-5)
    assert repaired.notes["cross_term_error"] > 0.2


def test_safe_merge_refuses_what_it_cannot_merge() -> None:
    task, aligned = adapter(1), adapter(2)
    partial = Adapter(dict(list(adapter(3).lora_weights.items())[1:]), None, {})
    with pytest.raises(SiteError, match="safety LoRA has no pair"):
        baselines.safe_merge(task, partial, aligned.lora_weights, threshold=2.0)
    baselines.safe_merge(task, partial, aligned.lora_weights, threshold=-2.0)
    with pytest.raises(ShapeError, match="ranks must agree"):
        baselines.safe_merge(
            task, adapter(3, rank=2), aligned.lora_weights, threshold=2.0, form="linear"
        )


# -- RESTA -----------------------------------------------------------------------------------------


def test_resta_adds_b_times_the_vector_at_the_sites_of_both() -> None:
    first, second, third = SITES
    task = adapter(1, scaling=2.0, sites={s: SITES[s] for s in (first, second)})
    vector = adapter(
        2, rank=2, scaling=-0.5, sites={s: SITES[s] for s in (second, third)}
    ).lora_weights
    lora_weights = baselines.resta(task, vector, 0.7).adapter.lora_weights
    for site, expected in (
        (first, dense(task.lora_weights[first])),
        (second, dense(task.lora_weights[second]) + 0.7 * dense(vector[second])),
        (third, 0.7 * dense(vector[third])),
    ):
        torch.testing.assert_close(dense(lora_weights[site]), expected, rtol=1e-5, atol=1e-6)
    assert lora_weights[second].rank == 6


def test_dare_drops_the_rate_rescales_the_rest_and_follows_the_seed() -> None:
    lora = random_lora_weights({"model.layers.0.x": (300, 200)}, 4, 1)["model.layers.0.x"]
    found = baselines.dropped(lora, 0.3, 5)
    kept = found != 0
    assert 1 - kept.float().mean().item() == pytest.approx(0.3, abs=0.01)
    torch.testing.assert_close(found[kept], delta(lora, 1.0)[kept] / 0.7)
    assert torch.equal(found, baselines.dropped(lora, 0.3, 5))
    assert not torch.equal(found, baselines.dropped(lora, 0.3, 6))
    with pytest.raises(ConfigError, match="drop rate is 1"):
        baselines.dropped(lora, 1.0, 5)


def test_resta_with_dare_keeps_the_leading_directions_and_tells_their_energy() -> None:
    task, vector = adapter(1), adapter(2, rank=2).lora_weights
    whole = baselines.resta(task, vector, 1.0, drop=0.5, rank=16, seed=3)
    assert whole.notes["energy_kept"] == pytest.approx(1.0)
    cut = baselines.resta(task, vector, 1.0, drop=0.5, seed=3)
    captured = total = 0.0
    for site in SITES:
        added = dense(vector[site])
        full = dense(whole.adapter.lora_weights[site]) - added
        entries = full[full.abs() > 1e-5] / dense(task.lora_weights[site])[full.abs() > 1e-5]
        torch.testing.assert_close(entries, torch.full_like(entries, 2.0), rtol=1e-3, atol=0)
        values = torch.linalg.svdvals(full)
        captured += values[:4].square().sum().item()
        total += values.square().sum().item()
        left = full - (dense(cut.adapter.lora_weights[site]) - added)
        assert left.norm().item() == pytest.approx(values[4:].norm().item(), rel=1e-3)
    assert cut.notes["energy_kept"] == pytest.approx(captured / total, rel=1e-4)
    assert 0.3 < cut.notes["energy_kept"] < 0.95


def test_what_a_baseline_returns_can_be_saved_and_served(tmp_path: Path) -> None:
    task, vector, aligned = adapter(1, scaling=2.0), adapter(2, rank=2).lora_weights, adapter(4)
    for number, repaired in enumerate(
        (
            baselines.no_repair(task),
            baselines.safe_lora(task, aligned.lora_weights),
            baselines.safe_merge(task, adapter(3), aligned.lora_weights, threshold=0.5),
            baselines.resta(task, vector, 0.5),
        )
    ):
        save_adapter(repaired.adapter, tmp_path / str(number), base_model="parent")
        read = load_adapter(tmp_path / str(number))
        for site, lora in repaired.adapter.lora_weights.items():
            assert torch.equal(dense(read.lora_weights[site]), dense(lora))
