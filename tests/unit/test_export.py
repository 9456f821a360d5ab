"""Exports against compose's float32 reference and against merged Hugging Face models."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from safegene_vllm.composition import delta, merge_into
from safegene_vllm.errors import (
    AdapterRejectedError,
    BoundsError,
    FamilyMismatchError,
    FormatError,
    NonFiniteError,
    ShapeError,
    SiteError,
)
from safegene_vllm.export import (
    RECORD_FILE,
    export_adapter,
    export_checkpoint,
)
from safegene_vllm.formats.adapter import Adapter, layer_of, load_adapter, save_adapter
from safegene_vllm.formats.checkpoint import read_checkpoint
from safegene_vllm.formats.family import Family
from safegene_vllm.formats.profile import Profile, make_profile
from safegene_vllm.tiny_model import (
    linear_sites,
    make_model,
    random_lora_weights,
    write_family,
    write_tenant,
)

WEIGHTS = "model.safetensors"
COEFFICIENTS = (0.5, 1.25)
IDS = torch.tensor([[1, 5, 9, 200, 31, 7]])


@dataclass(frozen=True)
class Case:
    """A model, its family, a LoRA tenant of another rank on two modules, and its profile."""

    model: Path
    family: Family
    tenant: Path
    profile: Profile


def build(root: Path, arch: str, **overrides: Any) -> Case:
    model = make_model(arch, root / "model", **overrides)
    family = write_family(model, root / "family")
    suffixes = {"glm4": ("o_proj", "gate_up_proj"), "phi3": ("qkv_proj", "gate_up_proj")}
    profile = write_tenant(
        model,
        root / "tenant",
        family,
        COEFFICIENTS,
        rank=3,
        suffixes=suffixes.get(arch, ("q_proj", "down_proj")),
    )
    config = json.loads((root / "tenant" / "adapter_config.json").read_text())
    config["lora_alpha"] = 2 * config["r"]
    (root / "tenant" / "adapter_config.json").write_text(json.dumps(config))
    assert profile is not None
    return Case(model, family, root / "tenant", profile)


ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "glm4-fused": ("glm4", {}),
    "phi3-fused": ("phi3", {}),
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    arch, overrides = ARCHITECTURES[request.param]
    return build(tmp_path_factory.mktemp(request.param), arch, **overrides)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return build(tmp_path_factory.mktemp("llama"), "llama")


def reference(case: Case, *, tenant: bool) -> Any:
    """The model with every delta added to its own modules in float32."""
    model = AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32)
    modules = dict(model.named_modules())
    with torch.no_grad():
        for site, lora in case.family.lora_weights.items():
            layer = layer_of(site)
            assert layer is not None
            modules[site].weight += delta(lora, COEFFICIENTS[layer])
        for site, lora in load_adapter(case.tenant).lora_weights.items() if tenant else ():
            modules[site].weight += delta(lora, 1.0)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


# A composed adapter


@pytest.mark.parametrize("with_tenant", [True, False])
def test_the_composed_adapter_in_peft_is_the_merged_model(
    case: Case, tmp_path: Path, with_tenant: bool
) -> None:
    tenant = case.tenant if with_tenant else None
    done = export_adapter(tenant, case.family, case.profile, tmp_path / "out")
    assert done.max_rank == (7 if with_tenant else 4)
    base = AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32)
    plain = logits(base)
    found = logits(PeftModel.from_pretrained(base, tmp_path / "out"))
    close(found, logits(reference(case, tenant=with_tenant)))
    assert not torch.allclose(found, plain, atol=1e-2)


def test_every_site_has_the_one_rank_that_the_config_says(llama: Case, tmp_path: Path) -> None:
    export_adapter(llama.tenant, llama.family, llama.profile, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (7, 7, {})
    assert {lora.rank for lora in load_adapter(tmp_path / "out").lora_weights.values()} == {7}


def test_a_bare_profile_exports_the_vector_alone(llama: Case, tmp_path: Path) -> None:
    write_tenant(llama.model, tmp_path / "bare", llama.family, COEFFICIENTS, adapter=False)
    export_adapter(tmp_path / "bare", llama.family, llama.profile, tmp_path / "out")
    for site, lora in load_adapter(tmp_path / "out").lora_weights.items():
        layer = layer_of(site)
        assert layer is not None
        close(delta(lora, 1.0), delta(llama.family.lora_weights[site], COEFFICIENTS[layer]), 1e-6)


def test_sites_that_add_nothing_are_left_out_unless_all_would_be(
    llama: Case, tmp_path: Path
) -> None:
    half = make_profile(llama.family.header, [0.0, 1.0])
    export_adapter(None, llama.family, half, tmp_path / "half")
    assert {layer_of(site) for site in load_adapter(tmp_path / "half").lora_weights} == {1}
    none = make_profile(llama.family.header, 0.0)
    assert export_adapter(None, llama.family, none, tmp_path / "none").sites == 14


def test_an_export_carries_a_record_and_no_profile(llama: Case, tmp_path: Path) -> None:
    export_adapter(llama.tenant, llama.family, llama.profile, tmp_path / "a")
    export_checkpoint(llama.model, llama.tenant, llama.family, llama.profile, tmp_path / "c")
    for out in (tmp_path / "a", tmp_path / "c"):
        assert not (out / "safegene.json").exists()
        record = json.loads((out / RECORD_FILE).read_text())
        assert record["family"]["digest"] == llama.family.digest
        assert record["profile"] == llama.profile.digest
        assert record["coefficients"] == list(COEFFICIENTS)


def test_an_export_is_not_exported_again(llama: Case, tmp_path: Path) -> None:
    export_adapter(llama.tenant, llama.family, llama.profile, tmp_path / "a")
    export_checkpoint(llama.model, None, llama.family, llama.profile, tmp_path / "c")
    with pytest.raises(AdapterRejectedError, match="added twice"):
        export_adapter(tmp_path / "a", llama.family, llama.profile, tmp_path / "b")
    with pytest.raises(AdapterRejectedError, match="added twice"):
        export_checkpoint(tmp_path / "c", None, llama.family, llama.profile, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_an_export_never_replaces_a_tenant(llama: Case, tmp_path: Path) -> None:
    write_tenant(llama.model, tmp_path / "t", llama.family, 1.0)
    with pytest.raises(FormatError, match=r"safegene\.json"):
        export_adapter(None, llama.family, llama.profile, tmp_path / "t")
    for overwrite in (False, True):
        with pytest.raises(FormatError, match="exists"):
            export_checkpoint(
                llama.model,
                None,
                llama.family,
                llama.profile,
                tmp_path / "t",
                overwrite=overwrite,
            )


# A merged checkpoint


@pytest.mark.parametrize("with_tenant", [True, False])
def test_the_merged_checkpoint_is_the_merged_model(
    case: Case, tmp_path: Path, with_tenant: bool
) -> None:
    tenant = case.tenant if with_tenant else None
    export_checkpoint(case.model, tenant, case.family, case.profile, tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    close(logits(found), logits(reference(case, tenant=with_tenant)))


def test_weights_are_merge_intos_and_others_stay_bit_for_bit(case: Case, tmp_path: Path) -> None:
    export_checkpoint(case.model, None, case.family, case.profile, tmp_path / "out")
    before, after = load_file(case.model / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert list(before) == list(after)
    for name, tensor in before.items():
        lora = case.family.lora_weights.get(name.removesuffix(".weight"))
        layer = layer_of(name)
        if lora is None or layer is None:
            assert torch.equal(after[name], tensor)
        else:
            assert torch.equal(after[name], merge_into(tensor, lora, COEFFICIENTS[layer]))


def test_tied_embeddings_stay_one_tensor(tmp_path: Path) -> None:
    case = build(tmp_path, "qwen2", tie_word_embeddings=True)
    export_checkpoint(case.model, case.tenant, case.family, case.profile, tmp_path / "out")
    assert "lm_head.weight" not in read_checkpoint(tmp_path / "out").infos
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    lora_weights = random_lora_weights({"lm_head": (320, 128)}, 2, 1)
    save_adapter(Adapter(lora_weights, None, {}), tmp_path / "head", base_model=None)
    with pytest.raises(SiteError, match="ties its word embeddings"):
        export_checkpoint(
            case.model, tmp_path / "head", case.family, case.profile, tmp_path / "out2"
        )


def test_shards_stay_shards_and_bf16_is_rounded_once(tmp_path: Path) -> None:
    case = build(tmp_path, "llama", dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(case.model, dtype="auto")
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    out = tmp_path / "out"
    seen: list[tuple[int, int]] = []
    export_checkpoint(
        tmp_path / "shards",
        case.tenant,
        case.family,
        case.profile,
        out,
        progress=lambda done, total: seen.append((done, total)),
    )
    source, merged = read_checkpoint(tmp_path / "shards"), read_checkpoint(out)
    assert len(merged.shards) > 2 and dict(merged.shards) == dict(source.shards)
    index = "model.safetensors.index.json"
    assert (out / index).read_bytes() == (tmp_path / "shards" / index).read_bytes()
    assert seen[-1][0] == seen[-1][1] and len(seen) == len(source.infos)
    tenant = load_adapter(case.tenant).lora_weights
    for site in linear_sites(case.model):
        layer = layer_of(site)
        assert layer is not None
        exact = source.read(f"{site}.weight").float()
        exact += delta(case.family.lora_weights[site], COEFFICIENTS[layer])
        exact += delta(tenant[site], 1.0) if site in tenant else 0.0
        found = merged.read(f"{site}.weight")
        assert found.dtype == torch.bfloat16
        # Half a unit in the last place of bfloat16, and float32 noise.
        assert bool(((found.float() - exact).abs() <= exact.abs() * 2**-8 + 1e-5).all())


def test_companion_files_are_copied_and_other_files_are_not(llama: Case, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for path in llama.model.iterdir():
        (base / path.name).symlink_to(path)
    for name in ("tokenizer.json", "merges.txt", "tokenizer.model", "chat_template.jinja"):
        (base / name).write_text("{}")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool.jinja").write_text("x")
    for name in ("LICENSE", "model.safetensors.index.json", "pytorch_model.bin", "README.md"):
        (base / name).write_text("{}")
    out = tmp_path / "out"
    export_checkpoint(base, None, llama.family, llama.profile, out)
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == {
        *("config.json", "generation_config.json", "LICENSE", WEIGHTS, RECORD_FILE),
        *("tokenizer.json", "merges.txt", "tokenizer.model", "chat_template.jinja"),
        "additional_chat_templates/tool.jinja",
    }
    assert not any(path.is_symlink() for path in out.rglob("*"))


def test_a_failed_export_leaves_nothing_and_an_earlier_one_alone(
    llama: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    export_checkpoint(llama.model, None, llama.family, llama.profile, out)
    before = (out / WEIGHTS).read_bytes()

    def interrupted(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    for target, overwrite in ((out, True), (tmp_path / "fresh", False)):
        with pytest.raises(KeyboardInterrupt):
            export_checkpoint(
                llama.model,
                llama.tenant,
                llama.family,
                llama.profile,
                target,
                overwrite=overwrite,
                progress=interrupted,
            )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / WEIGHTS).read_bytes() == before
    export_checkpoint(llama.model, llama.tenant, llama.family, llama.profile, out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / WEIGHTS).read_bytes() != before


def test_what_cannot_be_merged_is_rejected_by_name(llama: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    other = make_model("llama", tmp_path / "wide", intermediate_size=256)
    with pytest.raises(FamilyMismatchError, match="fingerprint"):
        export_checkpoint(other, None, llama.family, llama.profile, out)
    with pytest.raises(BoundsError):
        wild = Profile(llama.family.digest, (9.0, 0.0))
        export_checkpoint(llama.model, None, llama.family, wild, out)
    with pytest.raises(FormatError, match="expected a Hugging Face checkpoint"):
        export_checkpoint(llama.tenant, None, llama.family, llama.profile, out)
    lora_weights = random_lora_weights({"model.layers.0.self_attn.extra_proj": (8, 8)}, 2, 1)
    save_adapter(Adapter(lora_weights, None, {}), tmp_path / "odd", base_model=None)
    with pytest.raises(SiteError, match="no weight for the target module"):
        export_checkpoint(llama.model, tmp_path / "odd", llama.family, llama.profile, out)
    lora_weights = random_lora_weights({"model.layers.0.self_attn.q_proj": (64, 64)}, 2, 1)
    save_adapter(Adapter(lora_weights, None, {}), tmp_path / "small", base_model=None)
    with pytest.raises(FamilyMismatchError, match=r"\(64, 64\)"):
        export_checkpoint(llama.model, tmp_path / "small", llama.family, llama.profile, out)
    assert not out.exists()


def test_quantized_and_overflowing_weights_are_rejected(llama: Case, tmp_path: Path) -> None:
    base = make_model("llama", tmp_path / "base")
    tensors = load_file(base / WEIGHTS)
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, base / WEIGHTS)
    with pytest.raises(ShapeError, match="I8"):
        export_checkpoint(base, None, llama.family, llama.profile, tmp_path / "out")
    full = torch.full_like(tensors[name], 65504.0)
    save_file({**tensors, name: full.half()}, base / WEIGHTS)
    lora_weights = random_lora_weights(
        {name.removesuffix(".weight"): (128, 128)}, 2, 1, strength=300.0
    )
    save_adapter(Adapter(lora_weights, None, {}), tmp_path / "loud", base_model=None)
    with pytest.raises(NonFiniteError):
        export_checkpoint(base, tmp_path / "loud", llama.family, llama.profile, tmp_path / "out")
    assert not (tmp_path / "out").exists()
