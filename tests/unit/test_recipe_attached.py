"""A vector on a running model is W + λ·B·A, as compose merges it; off again, nothing is left."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from safegene_vllm.composition import merge_into
from safegene_vllm.errors import SiteError
from safegene_vllm.formats.adapter import LoRAWeights, layer_of
from safegene_vllm.recipe.attached import AttachedVector, init_lora_weights
from safegene_vllm.tiny_model import CONFIGS, linear_sites, make_model, random_lora_weights

LAYERS = 2
COEFFICIENTS = (0.7, -0.4)
IDS = torch.arange(3, 27).reshape(2, 12)
FUSED = {"glm4": "gate_up_proj", "phi3": "qkv_proj"}


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(request.param, tmp_path_factory.mktemp("models") / request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("llama"))


def loaded(checkpoint: Path, dtype: torch.dtype = torch.float32) -> Any:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    return model.requires_grad_(False).eval()


def vector(checkpoint: Path) -> dict[str, LoRAWeights]:
    """Random pairs at every site, with a scaling that counts."""
    lora_weights = random_lora_weights(linear_sites(checkpoint), 4, 7, strength=0.3)
    return {site: replace(lora, scaling=1.5) for site, lora in lora_weights.items()}


def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def test_the_hooks_are_the_merged_weights(checkpoint: Path) -> None:
    lora_weights = vector(checkpoint)
    fused = FUSED.get(checkpoint.name)
    assert fused is None or any(site.endswith(fused) for site in lora_weights)
    model, merged = loaded(checkpoint), loaded(checkpoint)
    for site, lora in lora_weights.items():
        weight = merged.get_submodule(site).weight
        weight.data = merge_into(weight.data, lora, COEFFICIENTS[layer_of(site) or 0])
    attached = AttachedVector(lora_weights, LAYERS)
    attached.coefficients = torch.tensor(COEFFICIENTS)
    plain = logits(model)
    with attached.applied_to(model):
        found = logits(model)
    expected = logits(merged)
    size = float(expected.abs().max())
    assert float((plain - expected).abs().max()) > 0.1 * size
    torch.testing.assert_close(found, expected, atol=2e-5 * size, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_it_and_at_zero_nothing_changes_by_a_bit(
    checkpoint: Path, dtype: torch.dtype
) -> None:
    model = loaded(checkpoint, dtype)
    before = logits(model)
    attached = AttachedVector(vector(checkpoint), LAYERS)
    with attached.applied_to(model):
        assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)
    attached.coefficients = torch.zeros(LAYERS)
    with attached.applied_to(model):
        assert torch.equal(logits(model), before)


def test_an_error_inside_takes_it_off_too(llama: Path) -> None:
    model = loaded(llama)
    before = logits(model)
    with pytest.raises(KeyError), AttachedVector(vector(llama), LAYERS).applied_to(model):
        raise KeyError
    assert torch.equal(logits(model), before)
    assert not any(module._forward_hooks for module in model.modules())


def test_each_layer_has_its_own_coefficient(llama: Path) -> None:
    model = loaded(llama)
    lora_weights = vector(llama)
    both, first = AttachedVector(lora_weights, LAYERS), AttachedVector(lora_weights, LAYERS)
    both.coefficients = torch.tensor([1.0, 0.0])
    first.a = {site: half for site, half in first.a.items() if layer_of(site) == 0}
    with both.applied_to(model):
        found = logits(model)
    with first.applied_to(model):
        assert torch.equal(logits(model), found)


def test_a_site_that_the_model_lacks_is_named(llama: Path) -> None:
    lora_weights = {
        "model.layers.7.self_attn.q_proj": LoRAWeights(torch.zeros(1, 8), torch.zeros(8, 1))
    }
    model = loaded(llama)
    with (
        pytest.raises(SiteError, match=r"layers\.7\.self_attn\.q_proj"),
        AttachedVector(lora_weights, 8).applied_to(model),
    ):
        pytest.fail("attached to nothing")


def test_lora_weights_and_coefficients_can_be_trained_and_the_model_is_not(llama: Path) -> None:
    model = loaded(llama)
    lora_weights = vector(llama)
    retained = {site: (lora.a.clone(), lora.b.clone()) for site, lora in lora_weights.items()}
    attached = AttachedVector(lora_weights, LAYERS)
    parameters = attached.parameters()
    attached.coefficients = torch.ones(LAYERS, requires_grad=True)
    assert list(parameters) == sorted(f"{site}.{half}" for site in lora_weights for half in "AB")
    with attached.applied_to(model):
        logits(model).square().mean().backward()
    assert all(bool(tensor.grad.abs().sum() > 0) for tensor in parameters.values())
    assert bool((attached.coefficients.grad != 0).all())
    assert all(weight.grad is None for weight in model.parameters())
    with torch.no_grad():
        for tensor in parameters.values():
            tensor += 1.0
    for site, lora in attached.lora_weights().items():
        a, b = retained[site]
        torch.testing.assert_close(lora.a, a + 1.0)
        torch.testing.assert_close(lora.b, b * 1.5 + 1.0)
        assert lora.scaling == 1.0
        # The given LoRA weights are the caller's.
        assert torch.equal(lora_weights[site].a, a) and torch.equal(lora_weights[site].b, b)


def test_lora_weights_are_taken_as_they_are_now(llama: Path) -> None:
    attached = AttachedVector(vector(llama), LAYERS)
    site = next(iter(attached.a))
    snapshot = attached.lora_weights()[site].a.clone()
    taken = attached.lora_weights()[site]
    attached.a[site] += 1.0
    assert torch.equal(taken.a, snapshot)


def test_fresh_lora_weights_are_zero_and_follow_their_seed() -> None:
    shapes = {"layers.1.x": (6, 400), "layers.0.y": (8, 9)}
    lora_weights = init_lora_weights(shapes, 3, 5)
    for site, (d_out, d_in) in shapes.items():
        lora = lora_weights[site]
        assert (lora.d_out, lora.d_in, lora.rank) == (d_out, d_in, 3)
        assert not lora.b.any()
        # Kaiming with a = √5: uniform within 1/√D_in, so with a standard deviation of 1/√(3 D_in).
        assert float(lora.a.abs().max()) <= d_in**-0.5
    assert float(lora_weights["layers.1.x"].a.std()) == pytest.approx((3 * 400) ** -0.5, rel=0.05)
    again, other = (
        init_lora_weights(dict(reversed(shapes.items())), 3, 5),
        init_lora_weights(shapes, 3, 6),
    )
    assert all(torch.equal(lora_weights[site].a, again[site].a) for site in shapes)
    assert not torch.equal(lora_weights["layers.0.y"].a, other["layers.0.y"].a)
