"""A vector as a difference: exact at full rank and for a LoRA, optimal below, rejected by name."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from safegene_vllm.composition import delta, merge_into
from safegene_vllm.errors import ConfigError, FamilyMismatchError, NonFiniteError, SiteError
from safegene_vllm.formats.adapter import Adapter, LoRAWeights, load_adapter, save_adapter
from safegene_vllm.formats.family import load_family, save_family
from safegene_vllm.recipe.difference import (
    Difference,
    Scope,
    as_family,
    between_checkpoints,
    lora_norm,
    of_adapter,
    truncated_lora,
)
from safegene_vllm.tiny_model import linear_sites, make_model, random_lora_weights, write_tenant

FULL = 192
WEIGHTS = "model.safetensors"
law = settings(max_examples=40, deadline=None)


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("aligned"))


def perturbed(model: Path, directory: Path, *, sites_only: bool = True) -> Path:
    """The checkpoint with noise on its linear sites (and, on request, on all other weights)."""
    shutil.copytree(model, directory)
    tensors = load_file(model / WEIGHTS)
    generator = torch.Generator().manual_seed(3)
    sites = linear_sites(model)
    for name, tensor in tensors.items():
        if not sites_only or name.removesuffix(".weight") in sites:
            noise = torch.randn(tensor.shape, generator=generator) * 0.1
            tensors[name] = tensor + noise.to(tensor.dtype)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def degraded(aligned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return perturbed(aligned, tmp_path_factory.mktemp("d") / "degraded")


# The algebra


@law
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
def test_the_lora_weights_are_the_best_of_their_rank(
    d_out: int, d_in: int, rank: int, seed: int
) -> None:
    d = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed))
    lora, total, captured = truncated_lora(d, rank)
    sigma = torch.linalg.svdvals(d.double())
    tail = float(sigma[rank:].square().sum())
    assert lora.rank == min(rank, d_out, d_in)
    assert (lora.d_out, lora.d_in) == (d_out, d_in)
    assert total == pytest.approx(float(sigma.square().sum()), rel=1e-12)
    assert captured / total == pytest.approx(1 - tail / total, abs=1e-9)
    assert float((d - delta(lora, 1.0)).square().sum()) == pytest.approx(tail, abs=1e-5)


@pytest.mark.parametrize("shape", [(6, 40), (40, 6)])
def test_at_full_rank_the_weights_are_the_difference_whatever_its_conditioning(
    shape: tuple[int, int],
) -> None:
    generator = torch.Generator().manual_seed(0)
    d = torch.randn(shape, generator=generator)
    d = d * torch.logspace(0, -6, shape[0])[:, None]
    lora, _, _ = truncated_lora(d, 6)
    torch.testing.assert_close(delta(lora, 1.0), d, atol=1e-6, rtol=1e-5)


def test_directions_without_energy_cost_no_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(9, 2, generator=generator).double() @ torch.eye(2, 7).double()
    lora, total, captured = truncated_lora(low, 5)
    assert lora.rank == 2 and captured == pytest.approx(total)


@law
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.floats(-3, 3, width=32))
def test_the_norm_needs_no_product(d_out: int, d_in: int, rank: int, scaling: float) -> None:
    lora = LoRAWeights(torch.randn(rank, d_in), torch.randn(d_out, rank), scaling)
    assert lora_norm(lora) == pytest.approx(float(delta(lora, 1.0).norm()), rel=1e-4, abs=1e-6)


# Two checkpoints


def test_degraded_plus_the_vector_is_aligned(aligned: Path, degraded: Path) -> None:
    difference = between_checkpoints(aligned, degraded, rank=FULL)
    ours, theirs = load_file(aligned / WEIGHTS), load_file(degraded / WEIGHTS)
    assert set(difference.lora_weights) == set(linear_sites(aligned))
    for site, lora in difference.lora_weights.items():
        merged = merge_into(theirs[f"{site}.weight"], lora, 1.0)
        torch.testing.assert_close(merged, ours[f"{site}.weight"], atol=1e-5, rtol=0)
    assert all(row.captured == pytest.approx(1.0) for row in difference.by_layer())
    assert difference.left_out == ()


def test_captured_energy_is_one_minus_the_tail(aligned: Path, degraded: Path) -> None:
    rank = 5
    ours, theirs = load_file(aligned / WEIGHTS), load_file(degraded / WEIGHTS)
    rows = between_checkpoints(aligned, degraded, rank=rank).by_layer()
    assert [row.layer for row in rows] == [0, 1] and all(row.sites == 7 for row in rows)
    for row in rows:
        own = [s for s in linear_sites(aligned) if f".{row.layer}." in s]
        sigmas = [
            torch.linalg.svdvals(ours[f"{s}.weight"].double() - theirs[f"{s}.weight"]) for s in own
        ]
        total = sum(float(s.square().sum()) for s in sigmas)
        tail = sum(float(s[rank:].square().sum()) for s in sigmas)
        assert row.norm == pytest.approx(total**0.5)
        assert row.captured == pytest.approx(1 - tail / total)
        assert 0 < row.captured < 1


def test_shards_and_dtypes_do_not_matter(aligned: Path, degraded: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(degraded)
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    single = as_family(between_checkpoints(aligned, degraded, rank=4), "x")
    split = as_family(between_checkpoints(aligned, tmp_path / "shards", rank=4), "x")
    assert {s: p.rank for s, p in single.lora_weights.items()} == dict.fromkeys(
        linear_sites(aligned), 4
    )
    for site, lora in single.lora_weights.items():
        assert torch.equal(lora.a, split.lora_weights[site].a) and torch.equal(
            lora.b, split.lora_weights[site].b
        )
    model.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    narrow = between_checkpoints(aligned, tmp_path / "bf16", rank=FULL)
    ours, theirs = load_file(aligned / WEIGHTS), load_file(tmp_path / "bf16" / WEIGHTS)
    for site, lora in narrow.lora_weights.items():
        merged = merge_into(theirs[f"{site}.weight"].float(), lora, 1.0)
        torch.testing.assert_close(merged, ours[f"{site}.weight"], atol=1e-5, rtol=0)


def test_equal_sites_carry_no_vector_and_nothing_is_an_error(aligned: Path, tmp_path: Path) -> None:
    shutil.copytree(aligned, tmp_path / "d")
    with pytest.raises(SiteError, match="no difference"):
        between_checkpoints(aligned, tmp_path / "d", rank=4)
    tensors = load_file(aligned / WEIGHTS)
    changed = "model.layers.1.mlp.up_proj"
    tensors[f"{changed}.weight"][0, 0] += 1.0
    save_file(tensors, tmp_path / "d" / WEIGHTS, metadata={"format": "pt"})
    difference = between_checkpoints(aligned, tmp_path / "d", rank=4)
    assert list(difference.lora_weights) == [changed] and difference.lora_weights[changed].rank == 1
    zero, one = difference.by_layer()
    assert (zero.sites, zero.norm, one.sites) == (0, 0.0, 1)
    assert [entry.layer for entry in as_family(difference, "x").header.layers] == [1]


def test_what_no_lora_can_represent_is_reported(aligned: Path, tmp_path: Path) -> None:
    degraded = perturbed(aligned, tmp_path / "d", sites_only=False)
    difference = between_checkpoints(aligned, degraded, rank=2)
    assert "model.embed_tokens.weight" in difference.left_out
    assert difference.recipe["left_out"]["model.layers.*.input_layernorm.weight"] == 2


def test_scope_restricts_layers_and_sites(aligned: Path, degraded: Path) -> None:
    scope = Scope(layers=(1,), endings=("q_proj", "mlp.down_proj"))
    difference = between_checkpoints(aligned, degraded, rank=2, scope=scope)
    assert set(difference.lora_weights) == {
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
    }
    assert difference.recipe["layers"] == [1]
    for wrong in (Scope(layers=(0, 2)), Scope(endings=("proj",)), Scope(endings=("lm_head",))):
        with pytest.raises(ConfigError, match=r"outside 0\.\.1|no site ends"):
            between_checkpoints(aligned, degraded, rank=2, scope=wrong)


def test_two_families_are_rejected_by_name(aligned: Path, tmp_path: Path) -> None:
    other = make_model("llama", tmp_path / "wide", intermediate_size=256)
    with pytest.raises(FamilyMismatchError, match=rf"{aligned}(.|\n)*{other}(.|\n)*down_proj"):
        between_checkpoints(aligned, other, rank=2)


def test_nan_is_rejected_and_named(aligned: Path, tmp_path: Path) -> None:
    shutil.copytree(aligned, tmp_path / "d")
    tensors = load_file(aligned / WEIGHTS)
    tensors["model.layers.0.self_attn.q_proj.weight"][3, 3] = float("nan")
    save_file(tensors, tmp_path / "d" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match="q_proj"):
        between_checkpoints(aligned, tmp_path / "d", rank=2)


def test_rank_and_device_are_checked(aligned: Path, degraded: Path) -> None:
    with pytest.raises(ConfigError, match="rank is 0"):
        between_checkpoints(aligned, degraded, rank=0)
    with pytest.raises(ConfigError, match="device 'abacus'"):
        between_checkpoints(aligned, degraded, rank=1, device="abacus")


def test_transposed_architectures_are_rejected(aligned: Path, tmp_path: Path) -> None:
    shutil.copytree(aligned, tmp_path / "gpt")
    config = json.loads((aligned / "config.json").read_text())
    config["architectures"] = ["GPT2LMHeadModel"]
    (tmp_path / "gpt" / "config.json").write_text(json.dumps(config))
    with pytest.raises(FamilyMismatchError, match="transposed"):
        between_checkpoints(tmp_path / "gpt", tmp_path / "gpt", rank=1)


# A LoRA as it is


def write_lora(
    aligned: Path, directory: Path, scaling: float, dtype: torch.dtype
) -> tuple[Path, dict[str, LoRAWeights]]:
    """A LoRA as PEFT would have left it: scaling in the config, not in b."""
    lora_weights = {
        site: LoRAWeights(lora.a.to(dtype), lora.b.to(dtype))
        for site, lora in random_lora_weights(linear_sites(aligned), 4, 11).items()
    }
    save_adapter(Adapter(lora_weights, None, {}), directory, base_model=None)
    config = json.loads((directory / "adapter_config.json").read_text())
    config["lora_alpha"] = config["r"] * scaling
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory, lora_weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaling", [1.0, 2.0, 0.3])
@pytest.mark.parametrize(("role", "sign"), [("degraded", -1.0), ("aligned", 1.0)])
def test_the_lora_form_is_exact(
    aligned: Path, tmp_path: Path, dtype: torch.dtype, scaling: float, role: str, sign: float
) -> None:
    adapter, lora_weights = write_lora(aligned, tmp_path / "lora", scaling, dtype)
    difference = of_adapter(aligned, adapter, role)  # type: ignore[arg-type]
    save_family(as_family(difference, "x"), tmp_path / "family")
    family = load_family(tmp_path / "family")
    assert family.lora_weights.keys() == lora_weights.keys()
    for site, lora in family.lora_weights.items():
        assert torch.equal(lora.a.float(), lora_weights[site].a.float())
        assert torch.equal(lora.b.float(), lora_weights[site].b.float() * (sign * scaling))
        assert lora.a.dtype == (dtype if scaling != 0.3 else torch.float32)
    assert all(row.captured == 1.0 for row in difference.by_layer())


def test_degrading_and_taking_the_vector_is_the_identity(aligned: Path, tmp_path: Path) -> None:
    adapter, _ = write_lora(aligned, tmp_path / "lora", 2.0, torch.float32)
    vector = of_adapter(aligned, adapter, "degraded").lora_weights
    for site, lora in load_adapter(adapter).lora_weights.items():
        assert torch.equal(delta(vector[site], 1.0), -delta(lora, 1.0))


def test_sites_of_a_lora_outside_the_layers_need_a_word(aligned: Path, tmp_path: Path) -> None:
    sites = {**linear_sites(aligned), "lm_head": (320, 128)}
    save_adapter(
        Adapter(random_lora_weights(sites, 2, 1), None, {}), tmp_path / "a", base_model=None
    )
    with pytest.raises(SiteError, match="lm_head is in no layer"):
        of_adapter(aligned, tmp_path / "a", "degraded")
    scope = Scope(endings=("q_proj",))
    assert len(of_adapter(aligned, tmp_path / "a", "degraded", scope=scope).lora_weights) == 2


def test_a_lora_of_another_model_is_rejected(aligned: Path, tmp_path: Path) -> None:
    lora_weights = random_lora_weights({"model.layers.0.self_attn.q_proj": (64, 64)}, 2, 1)
    save_adapter(Adapter(lora_weights, None, {}), tmp_path / "a", base_model=None)
    with pytest.raises(FamilyMismatchError, match=r"\(64, 64\).*\(128, 128\)"):
        of_adapter(aligned, tmp_path / "a", "aligned")


def test_an_untrained_lora_has_no_difference(aligned: Path, tmp_path: Path) -> None:
    write_tenant(aligned, tmp_path / "a", None, None)
    loaded = load_adapter(tmp_path / "a")
    zero = {
        site: replace(lora, b=torch.zeros_like(lora.b))
        for site, lora in loaded.lora_weights.items()
    }
    save_adapter(Adapter(zero, None, {}), tmp_path / "z", base_model=None)
    with pytest.raises(SiteError, match="B is zero"):
        of_adapter(aligned, tmp_path / "z", "degraded")


# The resulting family


def test_the_recipe_records_how_and_how_much(aligned: Path, degraded: Path, tmp_path: Path) -> None:
    difference: Difference = between_checkpoints(aligned, degraded, rank=3)
    family = as_family(difference, "tiny", bounds=(0.0, 1.5), dtype=torch.bfloat16)
    save_family(family, tmp_path / "family")
    header = load_family(tmp_path / "family").header
    assert header.bounds == (0.0, 1.5)
    assert {shape.dtype for shape in header.sites.values()} == {"BF16"}
    recipe = header.recipe
    assert (recipe["method"], recipe["form"], recipe["rank"]) == ("difference", "checkpoints", 3)
    assert recipe["dtype"] == "bfloat16" and recipe["degraded"] == "degraded"
    rows = difference.by_layer()
    assert [entry["captured"] for entry in recipe["energy"]] == [row.captured for row in rows]
    again = as_family(between_checkpoints(aligned, degraded, rank=3), "tiny", bounds=(0.0, 1.5))
    assert again.digest != family.digest
    assert as_family(difference, "tiny", bounds=(0.0, 1.5)).digest == again.digest
