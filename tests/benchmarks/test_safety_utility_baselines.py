"""Each baseline is its paper's formula, against the formula written out with dense matrices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.safety_utility import baselines
from safegene_vllm.composition import delta
from safegene_vllm.errors import SiteError
from safegene_vllm.formats.adapter import Adapter, LoRAWeights, load_adapter, save_adapter
from safegene_vllm.tiny_model import random_lora_weights

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
        task, aligned.lora_weights if form == "lora" else exact, threshold=2.0
    )
    assert repaired.changed == tuple(SITES)
    for site, lora in task.lora_weights.items():
        c = projector(exact[site])
        expected = c @ dense(lora)
        torch.testing.assert_close(
            dense(repaired.adapter.lora_weights[site]), expected, rtol=1e-5, atol=1e-6
        )
        assert repaired.similarity[site] == pytest.approx(cosine(expected, dense(lora)), abs=1e-5)


def test_safe_lora_projects_the_modules_at_or_below_the_threshold_and_no_other() -> None:
    task, aligned = adapter(1), adapter(2)
    found = baselines.similarities(task, aligned.lora_weights)
    low, middle, high = sorted(found, key=lambda site: found[site])
    repaired = baselines.safe_lora(task, aligned.lora_weights, threshold=found[middle])
    assert repaired.changed == tuple(sorted((low, middle)))
    assert torch.equal(repaired.adapter.lora_weights[high].b, task.lora_weights[high].b)
    assert not torch.equal(repaired.adapter.lora_weights[low].b, task.lora_weights[low].b)


def test_safe_lora_needs_a_difference_at_every_module_of_the_tenant() -> None:
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


def test_lora_weights_of_zeros_have_similarity_zero() -> None:
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


def test_safe_merge_rejects_what_it_cannot_merge() -> None:
    task, aligned = adapter(1), adapter(2)
    partial = Adapter(dict(list(adapter(3).lora_weights.items())[1:]), None, {})
    with pytest.raises(SiteError, match="safety LoRA has no weights"):
        baselines.safe_merge(task, partial, aligned.lora_weights, threshold=2.0)
    baselines.safe_merge(task, partial, aligned.lora_weights, threshold=-2.0)


# -- RESTA -----------------------------------------------------------------------------------------


def test_resta_adds_b_times_the_vector_at_the_target_modules_of_both() -> None:
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
