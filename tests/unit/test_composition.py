"""The laws of the reference mathematics: identity, linearity, and three forms that agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from format_files import BASE, SITES, random_adapter, tiny_family, tiny_llama, tiny_lora
from hypothesis import given, settings
from hypothesis import strategies as st

from safegene_vllm.composition import (
    compose_adapter,
    composed_lora,
    delta,
    gain_row,
    merge_into,
    merged_weight_name,
    safety_product,
)
from safegene_vllm.errors import BoundsError, FamilyMismatchError, NonFiniteError, ShapeError
from safegene_vllm.formats.adapter import Adapter, LoRAWeights, load_adapter, save_adapter
from safegene_vllm.formats.family import make_family
from safegene_vllm.formats.profile import Profile, make_profile

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
law = settings(max_examples=40, deadline=None)
coefficients = st.floats(-4, 4, width=32)
sizes = st.integers(1, 9)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, LoRAWeights, LoRAWeights]:
    """A weight (D_out, D_in), a tenant's and a safety pair for it, of any dtype and rank."""
    d_out, d_in, dtype = draw(sizes), draw(sizes), draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def random(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).to(dtype)

    def lora(rank: int, scaling: float) -> LoRAWeights:
        return LoRAWeights(random(rank, d_in), random(d_out, rank), scaling)

    scaling = draw(st.sampled_from([1.0, 0.5, 1 / 3]))
    return random(d_out, d_in), lora(draw(sizes), scaling), lora(draw(sizes), 1.0)


@law
@given(cases())
def test_a_coefficient_of_zero_is_the_identity(
    case: tuple[torch.Tensor, LoRAWeights, LoRAWeights],
) -> None:
    weight, tenant, safety = case
    x = torch.ones(2, safety.d_in)
    assert merge_into(weight, safety, 0.0) is weight
    assert not delta(safety, 0.0).any()
    assert not safety_product(x, safety, torch.zeros(2)).any()
    same = composed_lora(tenant, safety, 0.0)
    assert torch.equal(same.a, tenant.a.float())
    assert torch.equal(same.b, tenant.folded().b)
    assert not composed_lora(None, safety, 0.0).b.any()


@law
@given(cases(), coefficients, coefficients)
def test_every_form_is_linear_in_the_coefficient(
    case: tuple[torch.Tensor, LoRAWeights, LoRAWeights], one: float, two: float
) -> None:
    _, _, safety = case
    x = torch.linspace(-1, 1, 3 * safety.d_in).reshape(3, safety.d_in)
    forms: list[Callable[[float], torch.Tensor]] = [
        lambda c: delta(safety, c),
        lambda c: delta(composed_lora(None, safety, c), 1.0),
        lambda c: safety_product(x, safety, torch.full((3,), c)),
    ]
    for form in forms:
        close(form(one) + form(two), form(one + two), 1e-3)
        close(form(one) * 2, form(2 * one), 1e-3)


@law
@given(cases(), coefficients)
def test_the_three_forms_agree(
    case: tuple[torch.Tensor, LoRAWeights, LoRAWeights], coefficient: float
) -> None:
    weight, tenant, safety = case
    base = weight.float()
    x = torch.linspace(-1, 1, 4 * safety.d_in).reshape(4, safety.d_in)
    merged = merge_into(merge_into(base, tenant, 1.0), safety, coefficient)
    lora = composed_lora(tenant, safety, coefficient)
    through_lora = x @ base.T + (x @ lora.a.T) @ lora.b.T
    through_gain = (
        x @ merge_into(base, tenant, 1.0).T
        + safety_product(x, safety, torch.full((4,), coefficient))
    )  # fmt: skip
    close(through_lora, x @ merged.T, 1e-3)
    close(through_gain, x @ merged.T, 1e-3)
    assert lora.scaling == 1.0
    assert lora.a.dtype == lora.b.dtype == torch.float32


@law
@given(cases(), coefficients.filter(bool), st.integers(1, 12))
def test_merging_by_blocks_is_merging_at_once(
    case: tuple[torch.Tensor, LoRAWeights, LoRAWeights], coefficient: float, rows: int
) -> None:
    weight, tenant, _ = case
    before = weight.clone()
    merged = merge_into(weight, tenant, coefficient, rows=rows)
    expected = (weight.float() + delta(tenant, coefficient)).to(weight.dtype)
    assert merged.dtype == weight.dtype
    assert merged is not weight
    assert torch.equal(weight, before)
    close(merged.float(), expected.float(), 1e-5 if weight.dtype == torch.float32 else 2e-2)


def test_each_token_has_its_own_gain() -> None:
    lora, x = tiny_lora(), torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    gain = torch.tensor([0.0, 1.0, 2.5, 0.0])
    expected = torch.stack([delta(lora, float(g)) @ row for g, row in zip(gain, x, strict=True)])
    close(safety_product(x, lora, gain), expected)
    assert safety_product(x.bfloat16(), lora, gain.bfloat16()).dtype == torch.float32


def test_a_float64_weight_is_merged_in_float64() -> None:
    weight = torch.full((3, 4), 1e9, dtype=torch.float64)
    found = merge_into(weight, tiny_lora(), 1.0)
    assert torch.equal(found, weight + delta(tiny_lora(), 1.0).double())


@pytest.mark.parametrize(
    ("weight", "error", "says"),
    [
        (torch.ones(4, 3), ShapeError, r"\(4, 3\), the LoRA is for \(3, 4\)"),
        (torch.ones(12), ShapeError, "LoRA is for"),
        (torch.ones(3, 4, dtype=torch.int8), ShapeError, "quantized"),
        (torch.ones(3, 4).to(torch.float8_e4m3fn), ShapeError, "quantized"),
        (torch.full((3, 4), 65504.0, dtype=torch.float16), NonFiniteError, "rows 0"),
        (torch.full((3, 4), torch.nan), NonFiniteError, "NaN"),
    ],
)
def test_a_weight_that_cannot_be_merged_is_rejected(
    weight: torch.Tensor, error: type, says: str
) -> None:
    with pytest.raises(error, match=says):
        merge_into(weight, tiny_lora(), 100.0)


def test_lora_weights_of_different_shapes_are_not_composed() -> None:
    with pytest.raises(ShapeError, match="tenant's LoRA"):
        composed_lora(LoRAWeights(torch.ones(1, 5), torch.ones(3, 1)), tiny_lora(), 1.0)


def test_the_gain_row_is_the_profile() -> None:
    row = gain_row(make_profile(tiny_family().header, {2: 1.5}))
    assert row.dtype == torch.float32
    assert row.tolist() == [0.0, 0.0, 1.5]


def test_the_name_of_a_merged_weight() -> None:
    assert merged_weight_name("model.layers.0.q_proj") == "model.layers.0.q_proj.weight"


# compose_adapter: tenant, family and profile as one adapter.


def test_a_composed_adapter_has_all_sites_of_both() -> None:
    family = tiny_family()
    tenant = Adapter({"lm_head": tiny_lora(2), SITES[0]: tiny_lora(4, rank=3)}, "the/base", {})
    composed = compose_adapter(tenant, family, make_profile(family.header, {0: 0.5}))
    assert set(composed.lora_weights) == {"lm_head", *SITES}
    assert composed.base_model == "the/base"
    assert composed.lora_weights[SITES[0]].rank == 3 + 2
    expected = delta(tiny_lora(4, rank=3), 1.0) + delta(family.lora_weights[SITES[0]], 0.5)
    close(delta(composed.lora_weights[SITES[0]], 1.0), expected)
    close(delta(composed.lora_weights["lm_head"], 1.0), delta(tiny_lora(2), 1.0))
    assert not delta(composed.lora_weights[SITES[2]], 1.0).any()


def test_without_a_tenant_the_family_is_what_is_composed() -> None:
    family = tiny_family()
    composed = compose_adapter(None, family, make_profile(family.header, 2.0))
    assert set(composed.lora_weights) == set(SITES)
    assert composed.base_model is None
    for site in SITES:
        close(delta(composed.lora_weights[site], 1.0), delta(family.lora_weights[site], 2.0))


def test_a_zero_profile_leaves_the_tenant_as_it_is() -> None:
    family = tiny_family()
    tenant = Adapter({SITES[0]: tiny_lora(4, rank=3)}, None, {})
    lora = compose_adapter(tenant, family, make_profile(family.header, 0.0)).lora_weights[SITES[0]]
    assert torch.equal(lora.a, tenant.lora_weights[SITES[0]].a)
    assert torch.equal(lora.b, tenant.lora_weights[SITES[0]].b)


def test_the_profile_is_checked_first() -> None:
    family = tiny_family()
    with pytest.raises(BoundsError):
        compose_adapter(None, family, Profile(family.digest, (9.0, 0.0, 0.0)))
    with pytest.raises(FamilyMismatchError):
        compose_adapter(None, family, Profile("sha256:" + "0" * 64, (0.0, 0.0, 0.0)))


def test_a_tenant_of_other_shapes_is_of_another_family_and_every_site_is_named() -> None:
    family = tiny_family()
    wrong = LoRAWeights(torch.ones(1, 8), torch.ones(3, 1))
    tenant = Adapter({SITES[0]: wrong, SITES[2]: wrong}, None, {})
    with pytest.raises(FamilyMismatchError, match=rf"(?s)2 errors.*'tiny'.*{SITES[0]}.*{SITES[2]}"):
        compose_adapter(tenant, family, make_profile(family.header, 1.0))


def test_peft_serves_an_exported_adapter_like_the_merged_model(tmp_path: Any) -> None:
    from peft import PeftModel

    model = tiny_llama()
    lora_weights = random_adapter(model, {"q_proj": 2, "down_proj": 3}, seed=1).lora_weights
    family = make_family("tiny", replace(BASE, num_layers=2), lora_weights, recipe={})
    own = random_adapter(model, {"q_proj": 4, "v_proj": 4}, seed=2).lora_weights
    tenant = Adapter({site: replace(lora, scaling=0.3) for site, lora in own.items()}, None, {})
    profile = make_profile(family.header, [0.5, 2.0])
    composed = compose_adapter(tenant, family, profile)
    save_adapter(composed, tmp_path / "out", base_model=None)
    assert load_adapter(tmp_path / "out").config == composed.config

    merged = tiny_llama()
    for lora_weights, gains in (
        (tenant.lora_weights, (1.0, 1.0)),
        (family.lora_weights, profile.coefficients),
    ):
        for site, lora in lora_weights.items():
            module: Any = merged.get_submodule(site)
            layer = int(site.split(".")[2])
            module.weight.data = merge_into(module.weight.data, lora, gains[layer])
    tokens = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        exported: Any = PeftModel.from_pretrained(model, str(tmp_path / "out"))
        close(exported(tokens).logits, merged(tokens).logits, 1e-5)
