"""Checks of fetched files against a family, and the messages of their errors."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from artifact_files import FAMILY, a_profile, a_tenant
from format_files import SITES, edit_json, saved_family, tiny_lora

from safegene_server.artifacts.check import check_tenant_files
from safegene_vllm.errors import (
    AdapterRejectedError,
    BoundsError,
    DigestError,
    FamilyMismatchError,
    HeaderError,
    NonFiniteError,
    SafegeneError,
    ShapeError,
    TruncatedFileError,
)
from safegene_vllm.formats.adapter import Adapter, LoRAWeights, save_adapter
from safegene_vllm.formats.profile import Profile, save_profile
from safegene_vllm.formats.safetensors_file import read_tensors, serialize

WEIGHTS = "adapter_model.safetensors"


def check(directory: Path) -> Profile | None:
    return check_tenant_files(directory, FAMILY, "s3://bucket/acme")


def check_rejected(directory: Path, error: type[SafegeneError], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        check(directory)
    assert str(directory) not in str(caught.value)


def test_tenants_with_and_without_a_profile_pass(tmp_path: Path) -> None:
    assert check(a_tenant(tmp_path / "plain")) is None
    assert check(a_tenant(tmp_path / "both", profile=1.5)) == a_profile(1.5)
    save_profile(a_profile(0.5), tmp_path / "bare")
    assert check(tmp_path / "bare") == a_profile(0.5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_inf_are_found(tmp_path: Path, bad: float, dtype: torch.dtype) -> None:
    tenant = a_tenant(tmp_path / "acme")
    tensors = {name: t.to(dtype) for name, t in read_tensors(tenant / WEIGHTS).items()}
    (tenant / WEIGHTS).write_bytes(serialize(tensors))
    check(tenant)
    name = next(iter(tensors))
    tensors[name][-1, -1] = bad
    (tenant / WEIGHTS).write_bytes(serialize(tensors))
    check_rejected(
        tenant, NonFiniteError, rf"s3://bucket/acme/{WEIGHTS}: tensor '{name}' holds NaN"
    )


def test_another_shape_than_the_family_s_is_found(tmp_path: Path) -> None:
    lora = LoRAWeights(torch.ones(2, 5), torch.ones(3, 2))
    save_adapter(Adapter({SITES[0]: lora}, None, {}), tmp_path / "a", base_model=None)
    check_rejected(
        tmp_path / "a", FamilyMismatchError, r"s3://bucket/acme, .*\(3, 5\).*'tiny'.*\(3, 4\)"
    )


def test_layers_that_the_base_lacks_are_found(tmp_path: Path) -> None:
    sites = ("model.layers.1.mlp.up_proj", "model.layers.3.mlp.up_proj", "lm_head")
    lora_weights = {site: tiny_lora() for site in sites}
    save_adapter(Adapter(lora_weights, None, {}), tmp_path / "deep", base_model=None)
    check_rejected(tmp_path / "deep", FamilyMismatchError, r"layers\.3\..*'tiny' has layers 0 to 2")
    many = {f"model.layers.{'9' * 400}{n}.mlp.up_proj": tiny_lora() for n in range(30)}
    save_adapter(Adapter(many, None, {}), tmp_path / "many", base_model=None)
    with pytest.raises(FamilyMismatchError, match="and 27 more like this") as caught:
        check(tmp_path / "many")
    assert len(str(caught.value)) < 3000
    del lora_weights[sites[1]]
    save_adapter(Adapter(lora_weights, None, {}), tmp_path / "fits", base_model=None)
    assert check(tmp_path / "fits") is None


def test_a_config_that_does_not_fit_its_weights_is_found(tmp_path: Path) -> None:
    tenant = a_tenant(tmp_path / "acme")
    edit_json(tenant / "adapter_config.json", lambda config: config.update(r=4))
    check_rejected(tenant, ShapeError, "rank 2, adapter_config.json says 4")
    edit_json(tenant / "adapter_config.json", lambda config: config.update(use_dora=True))
    check_rejected(tenant, HeaderError, "use_dora")


def test_half_an_upload_is_found(tmp_path: Path) -> None:
    tenant = a_tenant(tmp_path / "acme")
    whole = (tenant / WEIGHTS).read_bytes()
    for length in (0, 7, 20, len(whole) - 1):
        (tenant / WEIGHTS).write_bytes(whole[:length])
        check_rejected(tenant, TruncatedFileError, "fetch it again")


def test_a_family_is_no_tenant(tmp_path: Path) -> None:
    saved_family(tmp_path / "family")
    check_rejected(tmp_path / "family", AdapterRejectedError, "s3://bucket/acme is a family")


def test_profiles_that_do_not_fit_are_found(tmp_path: Path) -> None:
    tenant = a_tenant(tmp_path / "acme")
    save_profile(Profile("sha256:" + 64 * "0", (0.0, 0.0, 0.0)), tenant)
    check_rejected(tenant, FamilyMismatchError, "calibrate the tenant against this family")
    save_profile(Profile(FAMILY.digest, (9.0, 0.0, 0.0)), tenant)
    check_rejected(tenant, BoundsError, "layer 0 has coefficient 9.0")
    edit_json(tenant / "safegene.json", lambda raw: raw.update(coefficients=[1.0, 0.0, 1.0]))
    check_rejected(tenant, DigestError, "s3://bucket/acme/safegene.json: .*altered")


def test_all_errors_are_reported_together(tmp_path: Path) -> None:
    tenant = a_tenant(tmp_path / "acme", profile=1.0)
    tensors = read_tensors(tenant / WEIGHTS)
    for tensor in tensors.values():
        tensor[0, 0] = float("nan")
    (tenant / WEIGHTS).write_bytes(serialize(tensors))
    edit_json(tenant / "safegene.json", lambda raw: raw.update(coefficients=[1.0, 0.0, 0.0]))
    check_rejected(tenant, NonFiniteError, r"(?s)2 errors:.*holds NaN.*DigestError: ")
    shutil.rmtree(tenant)
