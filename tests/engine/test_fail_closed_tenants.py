"""Tenants that must not be served, while all others are.

One engine takes every bad tenant in turn: each is rejected with an error that names the problem,
and the completion of a good tenant is the same, bit for bit, before and after.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from reference_engine import Completion, Engine, Request, engine

from safegene_vllm.errors import (
    AdapterRejectedError,
    BoundsError,
    DigestError,
    FamilyMismatchError,
    NonFiniteError,
    PickleRejectedError,
    SafegeneError,
    TruncatedFileError,
)
from safegene_vllm.formats.adapter import LoRAWeights
from safegene_vllm.formats.family import load_family, make_family, save_family
from safegene_vllm.formats.profile import Profile, save_profile
from safegene_vllm.tiny_model import linear_sites, make_model, write_family, write_tenant

pytestmark = pytest.mark.engine

PROMPT = [5, 9, 33, 77, 101]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def setup_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tenants")
    model = make_model("llama", root / "model")
    family = write_family(model, root / "family")
    write_tenant(model, root / "tenants" / "good", family, [0.5, 1.0], seed=3)
    write_tenant(model, root / "tenants" / "other", family, [1.5, 0.2], seed=4)
    write_tenant(model, root / "outside", family, [1.5, 0.2], seed=5)
    return root


@pytest.fixture(scope="module")
def running(setup_dir: Path) -> Iterator[tuple[Engine, Completion]]:
    settings = {"family": str(setup_dir / "family"), "adapter_roots": [str(setup_dir / "tenants")]}
    with engine(
        setup_dir / "model", settings, max_loras=2, max_cpu_loras=2, enable_prefix_caching=True
    ) as e:
        yield e, e.generate([Request(PROMPT, setup_dir / "tenants" / "good")])[0]


def bad(setup_dir: Path, name: str) -> Path:
    """A fresh copy of the good tenant, to be spoiled."""
    return Path(shutil.copytree(setup_dir / "tenants" / "good", setup_dir / "tenants" / name))


def with_row(setup_dir: Path, tenant: Path, family: str, row: tuple[float, ...]) -> None:
    (tenant / "safegene.json").unlink()
    save_profile(Profile(family, row), tenant)


def spoil_other_family(setup_dir: Path, tenant: Path) -> None:
    with_row(setup_dir, tenant, "sha256:" + "0" * 64, (0.5, 1.0))


def family_digest(setup_dir: Path) -> str:
    return str(json.loads((setup_dir / "family" / "safegene.json").read_text())["digest"])


def spoil_negative(setup_dir: Path, tenant: Path) -> None:
    with_row(setup_dir, tenant, family_digest(setup_dir), (-0.5, 1.0))


def spoil_length(setup_dir: Path, tenant: Path) -> None:
    with_row(setup_dir, tenant, family_digest(setup_dir), (0.5, 1.0, 0.0))


def spoil_too_strong(setup_dir: Path, tenant: Path) -> None:
    with_row(setup_dir, tenant, family_digest(setup_dir), (0.5, 99.0))


def spoil_nan_coefficient(setup_dir: Path, tenant: Path) -> None:
    text = (tenant / "safegene.json").read_text()
    raw = json.loads(text)
    raw["coefficients"] = [float("nan"), 1.0]
    (tenant / "safegene.json").write_text(json.dumps(raw))


def spoil_digest(setup_dir: Path, tenant: Path) -> None:
    raw = json.loads((tenant / "safegene.json").read_text())
    raw["coefficients"][0] += 0.25
    (tenant / "safegene.json").write_text(json.dumps(raw))


def spoil_no_profile(setup_dir: Path, tenant: Path) -> None:
    (tenant / "safegene.json").unlink()


def spoil_pickle(setup_dir: Path, tenant: Path) -> None:
    (tenant / WEIGHTS).rename(tenant / "adapter_model.bin")


def spoil_truncated(setup_dir: Path, tenant: Path) -> None:
    data = (tenant / WEIGHTS).read_bytes()
    (tenant / WEIGHTS).write_bytes(data[: len(data) // 2])


def spoil_nan_weight(setup_dir: Path, tenant: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(tenant / WEIGHTS)
    next(iter(tensors.values()))[0, 0] = float("inf")
    save_file(tensors, tenant / WEIGHTS)


def spoil_scaling(setup_dir: Path, tenant: Path) -> None:
    """Each number of its files is finite, what a slot would hold is not."""
    raw = json.loads((tenant / "adapter_config.json").read_text())
    raw["lora_alpha"] = 1e40
    (tenant / "adapter_config.json").write_text(json.dumps(raw))


def spoil_rank(setup_dir: Path, tenant: Path) -> None:
    shutil.rmtree(tenant)
    write_tenant(setup_dir / "model", tenant, None, None, rank=16)
    shutil.copy(setup_dir / "tenants" / "good" / "safegene.json", tenant)


def spoil_no_module(setup_dir: Path, tenant: Path) -> None:
    """vLLM alone would serve the base model for it, with HTTP 200."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(tenant / WEIGHTS)
    save_file(
        {k.replace("model.layers", "model.blocks"): v for k, v in tensors.items()}, tenant / WEIGHTS
    )


def spoil_symlink(setup_dir: Path, tenant: Path) -> None:
    shutil.rmtree(tenant)
    tenant.symlink_to(setup_dir / "outside")


def spoil_file_symlink(setup_dir: Path, tenant: Path) -> None:
    (tenant / WEIGHTS).unlink()
    (tenant / WEIGHTS).symlink_to(setup_dir / "outside" / WEIGHTS)


def spoil_checkpoint(setup_dir: Path, tenant: Path) -> None:
    """A full fine-tune: the base and the vector would be served under its name."""
    for name in ("adapter_config.json", WEIGHTS):
        (tenant / name).unlink()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(setup_dir / "model" / name, tenant / name)


def spoil_subdirectory(setup_dir: Path, tenant: Path) -> None:
    """As PEFT saves an adapter that has a name, and as trainers save their checkpoints."""
    (tenant / "sales").mkdir()
    for name in ("adapter_config.json", WEIGHTS):
        (tenant / name).rename(tenant / "sales" / name)


def spoil_mlx(setup_dir: Path, tenant: Path) -> None:
    (tenant / "adapter_config.json").unlink()
    (tenant / WEIGHTS).rename(tenant / "adapters.safetensors")


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (spoil_checkpoint, AdapterRejectedError, "full checkpoint .config.json, model.safetensors"),
        (spoil_subdirectory, AdapterRejectedError, "point at .*/sales instead"),
        (spoil_mlx, AdapterRejectedError, "adapters.safetensors.*MLX"),
        (spoil_other_family, FamilyMismatchError, "sha256:0000"),
        (spoil_negative, BoundsError, "-0.5"),
        (spoil_length, BoundsError, "3"),
        (spoil_too_strong, BoundsError, "99"),
        (spoil_nan_coefficient, NonFiniteError, "NaN"),
        (spoil_digest, DigestError, "sha256"),
        (spoil_no_profile, AdapterRejectedError, "serve_unprotected"),
        (spoil_pickle, (PickleRejectedError, AdapterRejectedError), "pickle|safetensors"),
        (spoil_truncated, TruncatedFileError, WEIGHTS),
        (spoil_nan_weight, NonFiniteError, "lora_[AB]"),
        (spoil_scaling, AdapterRejectedError, "overflows.*scaling 2.5e\\+39"),
        (spoil_rank, AdapterRejectedError, "rank 16.*--max-lora-rank 8"),
        (spoil_no_module, AdapterRejectedError, "no LoRA layer"),
        (spoil_symlink, AdapterRejectedError, "symbolic link"),
        (spoil_file_symlink, AdapterRejectedError, "cannot be read"),
    ],
)
def test_rejected_without_effect_on_other_tenants(
    setup_dir: Path, running: tuple[Engine, Completion], spoil, error, words: str
) -> None:
    e, before = running
    tenant = bad(setup_dir, spoil.__name__)
    spoil(setup_dir, tenant)
    with pytest.raises(error, match=words) as rejection:
        e.add(tenant)
    assert spoil.__name__ in str(rejection.value), "the message names the tenant or its path"
    assert e.generate([Request(PROMPT, setup_dir / "tenants" / "good")])[0] == before
    assert spoil.__name__ not in {a.name for r in e.receipts() for a in r.adapters}


def test_path_outside_the_root_and_parent_steps(
    setup_dir: Path, running: tuple[Engine, Completion]
) -> None:
    e, before = running
    for path in (
        setup_dir / "outside",
        setup_dir / "tenants" / ".." / "outside",
        Path("/nowhere/at/all"),
    ):
        with pytest.raises(AdapterRejectedError, match="adapter_roots"):
            e.add(path, f"outside-{path}")
    assert e.generate([Request(PROMPT, setup_dir / "tenants" / "good")])[0] == before


def test_in_place_reload_and_reused_id(setup_dir: Path, running: tuple[Engine, Completion]) -> None:
    e, _ = running
    request = e.lora(setup_dir / "tenants" / "good")
    request.load_inplace = True
    with pytest.raises(AdapterRejectedError, match="load_inplace"):
        e.llm.llm_engine.add_lora(request)
    stolen = e.lora(setup_dir / "tenants" / "good")
    stolen.lora_name = "another name"
    with pytest.raises(AdapterRejectedError, match="use a new id"):
        e.llm.llm_engine.add_lora(stolen)


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("reload_weights", {}),
        ("reset_weights", {}),
        ("update_config", {"overrides": {}}),
        ("discard", {"tags": ("weights",)}),
        ("sleep", {"level": 1}),
        ("load_model", {}),
    ],
)
def test_weights_replaced_under_the_vector(
    setup_dir: Path, running: tuple[Engine, Completion], method: str, arguments: dict
) -> None:
    e, before = running
    with pytest.raises(Exception, match=f"{method} would replace weights"):
        e.llm.collective_rpc(method, kwargs=arguments)
    assert e.generate([Request(PROMPT, setup_dir / "tenants" / "good")])[0] == before


def test_changed_content_under_the_same_name_and_path(
    setup_dir: Path, running: tuple[Engine, Completion]
) -> None:
    """Its cached prefixes would be of the old coefficients."""
    e, _ = running
    tenant = bad(setup_dir, "changing")
    e.add(tenant, "changing")
    (tenant / "safegene.json").unlink()
    save_profile(Profile(family_digest(setup_dir), (0.25, 0.25)), tenant)
    from vllm.lora.request import LoRARequest

    with pytest.raises(AdapterRejectedError, match="stale"):
        e.llm.llm_engine.add_lora(LoRARequest("changing", 900, str(tenant)))
    e.llm.llm_engine.add_lora(LoRARequest("changing@2", 901, str(tenant)))


def test_deleted_after_loading_and_evicted_then_requested_again(
    setup_dir: Path, running: tuple[Engine, Completion]
) -> None:
    e, before = running
    tenant = bad(setup_dir, "vanishing")
    first = e.generate([Request(PROMPT, tenant)])[0]
    shutil.rmtree(tenant)
    for name in ("good", "other"):  # two slots, two places in memory: the first one is evicted
        e.generate([Request(PROMPT, setup_dir / "tenants" / name)])
    assert e.generate([Request(PROMPT, tenant)])[0] == first == before
    assert e.generate([Request(PROMPT, setup_dir / "tenants" / "good")])[0] == before


def test_prompt_logprobs_on_a_tenant(setup_dir: Path, running: tuple[Engine, Completion]) -> None:
    e, before = running
    e.generate(
        [Request([7, 8, 9, 10], setup_dir / "tenants" / "good"), Request([4, 5])], prompt_logprobs=1
    )
    assert e.generate([Request(PROMPT, setup_dir / "tenants" / "good")])[0] == before


def test_a_profile_where_no_family_is_loaded(setup_dir: Path) -> None:
    """The package is installed without a family: a plain launch still rejects the profile."""
    for settings in (None, {"family": None, "missing_profile": "serve_unprotected"}):
        with (
            engine(setup_dir / "model", settings) as e,
            pytest.raises(SafegeneError, match="family"),
        ):
            e.add(setup_dir / "tenants" / "good")


def test_serve_unprotected_is_reported_in_the_receipt(setup_dir: Path) -> None:
    settings = {"family": str(setup_dir / "family"), "missing_profile": "serve_unprotected"}
    tenant = bad(setup_dir, "open")
    spoil_no_profile(setup_dir, tenant)
    with engine(setup_dir / "model", settings) as e:
        e.add(tenant)
        receipt = e.receipts()[0]
    assert receipt.unprotected_mode
    assert receipt.adapters[0].profile is None
    assert receipt.adapters[0].safety_sites == 0


def test_a_sum_that_overflows_its_slot(setup_dir: Path, tmp_path: Path) -> None:
    """Adapter and vector are finite in float16, the vector at this coefficient is not."""
    base = load_family(setup_dir / "family").header.base
    sites = {s: d for s, d in linear_sites(setup_dir / "model").items() if s.endswith("o_proj")}
    lora_weights = {
        s: LoRAWeights(torch.full((2, i), 1e-6), torch.full((o, 2), 3e4))
        for s, (o, i) in sites.items()
    }
    large = make_family("large", base, lora_weights, bounds=(0.0, 3.0), recipe={"method": "test"})
    save_family(large, tmp_path / "large")
    for name, value in (("fits", 2.0), ("overflows", 3.0)):
        write_tenant(setup_dir / "model", tmp_path / name, large, value)
        write_tenant(setup_dir / "model", tmp_path / f"{name}-alone", large, value, adapter=False)
    settings = {"family": str(tmp_path / "large"), "apply": "composed"}
    with engine(setup_dir / "model", settings, dtype="float16") as e:
        e.add(tmp_path / "fits")
        e.add(tmp_path / "fits-alone")
        before = e.generate([Request(PROMPT, tmp_path / "fits")])
        for name in ("overflows", "overflows-alone"):
            with pytest.raises(AdapterRejectedError, match=r"o_proj overflows torch\.float16"):
                e.add(tmp_path / name)
        assert e.generate([Request(PROMPT, tmp_path / "fits")]) == before


def test_weights_that_carry_the_vector_are_unchanged(setup_dir: Path, tmp_path: Path) -> None:
    """And may be put aside: sleep at level 1 takes nothing away."""
    shutil.copytree(setup_dir / "model", tmp_path / "full")
    save_profile(Profile(family_digest(setup_dir), (0.5, 1.0)), tmp_path / "full")
    settings = {"family": str(setup_dir / "family"), "apply": "weights"}
    with engine(tmp_path / "full", settings) as e:
        before, receipts = e.generate([Request(PROMPT)]), e.receipts()
        for method, arguments in (
            ("reload_weights", {"weights_path": str(setup_dir / "model")}),
            ("update_config", {"overrides": {"load_config": {"load_format": "auto"}}}),
            ("reset_weights", {}),
            ("discard", {"tags": ("weights",)}),
            ("sleep", {"level": 2}),
            ("load_model", {}),
        ):
            with pytest.raises(Exception, match=f"{method}.* would replace weights"):
                e.llm.collective_rpc(method, kwargs=arguments)
        e.llm.collective_rpc("sleep", kwargs={"level": 1})
        e.llm.collective_rpc("wake_up")
        assert e.generate([Request(PROMPT)]) == before
        assert e.receipts() == receipts
