"""A PEFT LoRA directory: what is rejected, scalings are PEFT's own, saving is exact."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from format_files import edit_json, ramp, random_adapter, tiny_llama, tiny_lora

from safegene_vllm.composition import delta, merge_into
from safegene_vllm.errors import (
    HeaderError,
    MissingFileError,
    NonFiniteError,
    PickleRejectedError,
    SafegeneError,
    ShapeError,
    SiteError,
    TruncatedFileError,
)
from safegene_vllm.formats.adapter import (
    Adapter,
    LoRAScaling,
    LoRAWeights,
    layer_of,
    load_adapter,
    read_adapter_shapes,
    save_adapter,
)
from safegene_vllm.formats.safetensors_file import read_tensors, serialize

SITE = "model.layers.1.mlp.up_proj"
A_NAME = f"base_model.model.{SITE}.lora_A.weight"
B_NAME = f"base_model.model.{SITE}.lora_B.weight"


@pytest.fixture
def good(tmp_path: Path) -> Path:
    save_adapter(Adapter({SITE: tiny_lora()}, None, {}), tmp_path / "good", base_model="base/model")
    return tmp_path / "good"


def config(**fields: Any) -> Callable[[Path], None]:
    return lambda directory: edit_json(
        directory / "adapter_config.json", lambda c: c.update(fields)
    )


def tensors(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        path = directory / "adapter_model.safetensors"
        values = read_tensors(path)
        change(values)
        path.write_bytes(serialize(values))

    return damage


def put(name: str, value: Any) -> Callable[[Path], None]:
    return tensors(lambda values: values.update({name: value}))


def only_pickle(name: str) -> Callable[[Path], Any]:
    return lambda directory: (directory / "adapter_model.safetensors").rename(directory / name)


def cut(name: str, length: int) -> Callable[[Path], Any]:
    return lambda d: (d / name).write_bytes((d / name).read_bytes()[:length])


BAD: dict[str, tuple[Callable[[Path], Any], type[SafegeneError], str]] = {
    "no directory": (shutil.rmtree, MissingFileError, "not a directory"),
    "no config": (lambda d: (d / "adapter_config.json").unlink(), MissingFileError, "config"),
    "no weights": (
        lambda d: (d / "adapter_model.safetensors").unlink(),
        MissingFileError,
        "safetensors",
    ),
    **{
        f"only a pickle {name}": (only_pickle(name), PickleRejectedError, name)
        for name in ("adapter_model.bin", "a.pt", "a.pth", "a.ckpt", "a.pkl")
    },
    "weights cut": (cut("adapter_model.safetensors", 100), TruncatedFileError, "fetch it again"),
    "config cut": (cut("adapter_config.json", 100), HeaderError, "JSON"),
    "alpha NaN": (config(lora_alpha=math.nan), NonFiniteError, "NaN"),
    "A without B": (tensors(lambda v: v.pop(B_NAME)), SiteError, "lora_A only"),
    "B without A": (tensors(lambda v: v.pop(A_NAME)), SiteError, "lora_B only"),
    "no tensor": (tensors(lambda v: v.clear()), SiteError, "touches no site"),
    "ranks of A and B": (put(A_NAME, ramp(3, 4)), ShapeError, "one R"),
    "rank of config": (config(r=4), ShapeError, "rank 2.*says 4"),
    "rank of rank_pattern": (config(rank_pattern={"up_proj": 8}), ShapeError, "rank 2.*says 8"),
    "one dimension": (put(A_NAME, torch.ones(2)), ShapeError, "one R"),
    "empty": (put(A_NAME, torch.ones(2, 0)), ShapeError, "none of them 0"),
    "two adapters": (
        tensors(lambda v: v.update({"base_model.model.x.lora_A.sales.weight": ramp(1, 1)})),
        SiteError,
        r"several adapters \('', 'sales'\)",
    ),
    "one weight twice": (
        put(A_NAME.replace("model.layers", "_orig_mod.model.layers"), ramp(2, 4)),
        SiteError,
        "are the same weight",
    ),
    "float64": (
        tensors(lambda v: v.update({k: t.double() for k, t in v.items()})),
        HeaderError,
        "F64",
    ),
    "embedding": (
        put("base_model.model.x.lora_embedding_A", ramp(1, 1)),
        SiteError,
        "LoRA on embeddings",
    ),
    "embeddings of added tokens": (
        put("base_model.model.model.embed_tokens.weight", ramp(9, 4)),
        SiteError,
        "all of embed_tokens, .* tokens were added",
    ),
    "magnitude": (
        put(f"base_model.model.{SITE}.lora_magnitude_vector", torch.ones(4)),
        SiteError,
        "magnitude of DoRA",
    ),
    "bias": (put(f"base_model.model.{SITE}.lora_B.bias", ramp(1, 1)), SiteError, r"lora_B\.bias"),
    "saved module": (put("base_model.model.lm_head.weight", ramp(1, 1)), SiteError, "lm_head"),
    "other prefix": (put(f"{SITE}.lora_A.weight", ramp(1, 1)), SiteError, "base_model.model"),
    "dora": (config(use_dora=True), HeaderError, "use_dora"),
    "modules_to_save": (config(modules_to_save=["lm_head"]), HeaderError, "modules_to_save"),
    "bias all": (config(bias="all"), HeaderError, "bias is 'all'"),
    "lora_bias": (config(lora_bias=True), HeaderError, "lora_bias"),
    "transposed": (config(fan_in_fan_out=True), HeaderError, "fan_in_fan_out"),
    "pissa": (config(init_lora_weights="pissa"), HeaderError, "changes the base"),
    "not lora": (config(peft_type="IA3"), HeaderError, "'IA3', expected 'LORA'"),
    "r zero": (config(r=0), HeaderError, "r is 0"),
    "r true": (config(r=True), HeaderError, "r is True"),
    "alpha text": (config(lora_alpha="8"), HeaderError, "lora_alpha is '8'"),
    "rank pattern list": (config(rank_pattern=[1]), HeaderError, "rank_pattern"),
    "alpha pattern text": (config(alpha_pattern={"a": "b"}), HeaderError, "alpha_pattern"),
    "pattern no regex": (config(alpha_pattern={"(": 1}), HeaderError, r"'\('.*not closed"),
    "two errors": (config(r=0, use_dora=True), HeaderError, "(?s)2 errors.*use_dora.*r is 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_adapter_has_a_named_error(good: Path, case: str) -> None:
    damage, error, says = BAD[case]
    damage(good)
    for read in (read_adapter_shapes, load_adapter):
        with pytest.raises(error, match=says) as caught:
            read(good)
        assert type(caught.value) is error


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_only_loading_sees_values_that_are_not_finite(good: Path, value: float) -> None:
    put(A_NAME, torch.full((2, 4), value))(good)
    assert set(read_adapter_shapes(good)) == {SITE}
    with pytest.raises(NonFiniteError, match="lora_A"):
        load_adapter(good)


@pytest.mark.parametrize(
    ("prefix", "suffix"),
    [
        ("base_model.model.", ".default.weight"),
        ("base_model.model.", ".sales.weight"),
        ("base_model.model._orig_mod.", ".weight"),
        ("_orig_mod.base_model.model.", ".default.weight"),
        ("base_model.model._fsdp_wrapped_module.", ".weight"),
    ],
)
def test_names_that_training_scripts_write_are_the_same_weights(
    good: Path, prefix: str, suffix: str
) -> None:
    before, shapes = load_adapter(good), read_adapter_shapes(good)

    def rename(values: dict[str, Any]) -> None:
        for name in list(values):
            own = name.removeprefix("base_model.model.").removesuffix(".weight")
            own = own.replace(".layers.0.", ".layers.0._checkpoint_wrapped_module.")
            values[f"{prefix}{own}{suffix}"] = values.pop(name)

    tensors(rename)(good)
    after = load_adapter(good)
    assert read_adapter_shapes(good) == shapes
    assert after.lora_weights.keys() == before.lora_weights.keys()
    for site, lora in before.lora_weights.items():
        assert torch.equal(after.lora_weights[site].a, lora.a)
        assert torch.equal(after.lora_weights[site].b, lora.b)
        assert after.lora_weights[site].scaling == lora.scaling


def test_halves_of_two_dtypes_are_both_read_exactly(good: Path) -> None:
    half = ramp(2, 4, dtype=torch.bfloat16)
    put(A_NAME, half)(good)
    (site,) = (site for site, shape in read_adapter_shapes(good).items() if shape.dtype == "F32")
    lora = load_adapter(good).lora_weights[site]
    assert (lora.a.dtype, lora.b.dtype) == (torch.float32, torch.float32)
    assert torch.equal(lora.a, half.float())


def test_a_pickle_next_to_safetensors_is_ignored(good: Path) -> None:
    (good / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert set(load_adapter(good).lora_weights) == {SITE}


def test_links_are_followed(good: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(good)
    assert set(load_adapter(tmp_path / "link").lora_weights) == {SITE}


def test_shapes_are_read_from_headers_alone(good: Path) -> None:
    shape = read_adapter_shapes(good)[SITE]
    assert (shape.rank, shape.d_in, shape.d_out, shape.dtype) == (2, 4, 3, "F32")


def test_a_and_b_must_fit_together() -> None:
    with pytest.raises(ShapeError, match="one R"):
        LoRAWeights(torch.ones(2, 4), torch.ones(3, 3))


@pytest.mark.parametrize(
    ("site", "layer"),
    [
        ("model.layers.11.self_attn.q_proj", 11),
        ("transformer.h.3.mlp", 3),
        ("transformer.blocks.0", 0),
        ("layers.7.x", 7),
        ("lm_head", None),
        ("model.mylayers.3.x", None),
        ("model.layers.x.3", None),
    ],
)
def test_the_layer_of_a_site(site: str, layer: int | None) -> None:
    assert layer_of(site) == layer


PEFT_CASES: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 6},
    "rank-stabilised": {"r": 3, "lora_alpha": 5, "use_rslora": True},
    "rank by name": {"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2}},
    "alpha by path": {"r": 4, "lora_alpha": 8, "alpha_pattern": {"layers.1.mlp.up_proj": 3}},
    "both, rank-stabilised": {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2, "layers.0.mlp.up_proj": 5},
        "alpha_pattern": {"up_proj": 1.5},
    },
    "regex keys": {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {r"^model\.layers\.0\..*": 2, r"1\.mlp\.(up|v)_proj": 3},
        "alpha_pattern": {r"layers\.\d+\.self_attn\.q_proj": 7, r".*_proj": 9},
    },
    "keys that only look alike": {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"proj": 2, "p_proj": 2, "^q_proj": 2},
        "alpha_pattern": {"layers.1": 3, "mlp": 3},
    },
}


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")
@pytest.mark.parametrize("case", PEFT_CASES)
def test_scalings_and_merged_weights_are_what_peft_computes(tmp_path: Path, case: str) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    before = {n: p.clone() for n, p in tiny_llama().state_dict().items()}
    torch.manual_seed(1)
    lora = LoraConfig(target_modules=["q_proj", "up_proj"], **PEFT_CASES[case])
    model: Any = get_peft_model(tiny_llama(), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    # Compared with what PEFT reads back: it sorts the patterns when it saves, and where two match
    # a name, the order decides.
    model = PeftModel.from_pretrained(tiny_llama(), str(tmp_path))

    adapter = load_adapter(tmp_path)
    assert len(adapter.lora_weights) == 4
    scalings = LoRAScaling(adapter.config)
    for site, lora in adapter.lora_weights.items():
        module = model.base_model.model.get_submodule(site)
        assert lora.scaling == module.scaling["default"] == scalings.scaling(site)
        torch.testing.assert_close(delta(lora, 1.0), module.get_delta_weight("default"))
    after = model.merge_and_unload().state_dict()
    for site, lora in adapter.lora_weights.items():
        name = f"{site}.weight"
        torch.testing.assert_close(merge_into(before[name], lora, 1.0, rows=7), after[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_saving_and_loading_is_the_identity(tmp_path: Path, dtype: torch.dtype) -> None:
    lora_weights = {SITE: tiny_lora(3, dtype=dtype), "lm_head": tiny_lora(5, rank=1, dtype=dtype)}
    save_adapter(Adapter(lora_weights, None, {}), tmp_path / "a", base_model="some/base")
    loaded = load_adapter(tmp_path / "a")
    assert loaded.base_model == "some/base"
    assert set(loaded.lora_weights) == set(lora_weights)
    for site, lora in lora_weights.items():
        assert loaded.lora_weights[site].scaling == 1.0
        assert loaded.lora_weights[site].a.dtype == dtype
        assert torch.equal(loaded.lora_weights[site].a, lora.a)
        assert torch.equal(loaded.lora_weights[site].b, lora.b)


@pytest.mark.parametrize(("scaling", "exact"), [(2.0, True), (0.5, True), (1 / 3, False)])
def test_a_scaling_is_folded_without_losing_a_bit(
    tmp_path: Path, scaling: float, exact: bool
) -> None:
    lora = LoRAWeights(ramp(2, 4, dtype=torch.bfloat16), ramp(3, 2, dtype=torch.bfloat16), scaling)
    save_adapter(Adapter({SITE: lora}, None, {}), tmp_path / "a", base_model=None)
    loaded = load_adapter(tmp_path / "a").lora_weights[SITE]
    assert loaded.scaling == 1.0
    assert loaded.b.dtype == (torch.bfloat16 if exact else torch.float32)
    assert torch.equal(loaded.b.float(), lora.folded().b)


def test_saving_casts_to_a_given_dtype(tmp_path: Path) -> None:
    lora = LoRAWeights(ramp(2, 4), ramp(3, 2), 1 / 3)
    save_adapter(
        Adapter({SITE: lora}, None, {}), tmp_path / "a", base_model=None, dtype=torch.bfloat16
    )
    loaded = load_adapter(tmp_path / "a").lora_weights[SITE]
    assert loaded.a.dtype == loaded.b.dtype == torch.bfloat16


def test_peft_computes_the_saved_scalings(tmp_path: Path) -> None:
    from peft import PeftModel

    model = tiny_llama()
    adapter = random_adapter(model, {"q_proj": 3, "up_proj": 2, "down_proj": 2})
    scaled = {site: LoRAWeights(p.a, p.b, 0.3) for site, p in adapter.lora_weights.items()}
    save_adapter(Adapter(scaled, None, {}), tmp_path / "a", base_model=None)
    loaded: Any = PeftModel.from_pretrained(model, str(tmp_path / "a"))
    for site, lora in scaled.items():
        module = loaded.base_model.model.get_submodule(site)
        assert module.scaling["default"] == 1.0
        assert module.r["default"] == lora.rank
        torch.testing.assert_close(module.get_delta_weight("default"), delta(lora, 1.0))


@pytest.mark.parametrize(
    ("lora_weights", "error"),
    [
        ({}, SiteError),
        ({SITE: LoRAWeights(torch.full((1, 2), math.nan), torch.ones(2, 1))}, NonFiniteError),
        ({SITE: LoRAWeights(torch.ones(1, 2).double(), torch.ones(2, 1).double())}, HeaderError),
        ({SITE: LoRAWeights(torch.ones(1, 0), torch.ones(2, 1))}, ShapeError),
    ],
)
def test_what_cannot_be_loaded_is_not_saved(
    tmp_path: Path, lora_weights: dict[str, LoRAWeights], error: type
) -> None:
    with pytest.raises(error):
        save_adapter(Adapter(lora_weights, None, {}), tmp_path / "a", base_model=None)
    assert list(tmp_path.iterdir()) == []


def test_a_new_adapter_takes_the_old_one_s_profile_with_it(good: Path) -> None:
    (good / "safegene.json").write_text(json.dumps({"kind": "profile"}))
    save_adapter(Adapter({SITE: tiny_lora(2)}, None, {}), good, base_model=None)
    assert {p.name for p in good.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize(
    "key", ["(a+)+x", "(a|a)*", ".*.*.*.*x", r"(\w)\1", "(?:a+){2,}", "a?" * 40 + "a" * 40]
)
@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_could_hang_a_worker_is_rejected(
    tmp_path: Path, option: str, key: str
) -> None:
    adapter = Adapter({"model.layers.0.mlp.up_proj": tiny_lora()}, None, {})
    save_adapter(adapter, tmp_path / "slow", base_model="x")
    edit_json(tmp_path / "slow" / "adapter_config.json", lambda c: c.update({option: {key: 4}}))
    with pytest.raises(HeaderError, match=f"{option} key .*; write 'q_proj'") as caught:
        read_adapter_shapes(tmp_path / "slow")
    assert repr(key[:100])[1:-1] in str(caught.value)


def test_a_pattern_of_many_alternatives_is_matched_in_a_few_steps(tmp_path: Path) -> None:
    site = "a" * 400
    save_adapter(Adapter({site: tiny_lora()}, None, {}), tmp_path / "slow", base_model="x")
    keys = {"(a|a)" * 400 + "b": 4, "(a|aa)" * 200: 2}
    edit_json(tmp_path / "slow" / "adapter_config.json", lambda c: c.update(rank_pattern=keys))
    assert set(read_adapter_shapes(tmp_path / "slow")) == {site}


def test_no_regular_expression_of_a_tenant_is_run(
    good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config(rank_pattern={"up_proj|^marked.*": 2}, alpha_pattern={r"marked\.\d+": 1})(good)
    compiled = re._compiler.compile  # type: ignore[attr-defined]

    def own(pattern: object, flags: int = 0) -> object:
        assert "marked" not in str(pattern), f"{pattern!r} is compiled"
        return compiled(pattern, flags)

    monkeypatch.setattr("re._compiler.compile", own)
    assert set(load_adapter(good).lora_weights) == {SITE}


def test_a_config_has_a_largest_size(good: Path) -> None:
    config(x_note="y" * (4 << 20))(good)
    with pytest.raises(HeaderError, match=r"adapter_config\.json has .* bytes, expected at"):
        read_adapter_shapes(good)


@pytest.mark.parametrize(
    "option", ["peft_type", "bias", "use_dora", "r", "lora_alpha", "rank_pattern", "alpha_pattern"]
)
def test_no_option_is_too_large_for_its_error(good: Path, option: str) -> None:
    config(**{option: ["y" * 100] * 1000})(good)
    with pytest.raises(HeaderError, match=option) as caught:
        read_adapter_shapes(good)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("scaling", [1.0, -2.0, 0.5, 1e30, 1e39, float("inf")])
@pytest.mark.parametrize("size", [0.0, 1e-8, 3.0, 65504.0, 65519.0, 65520.0, 3.39e38])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_fit_a_dtype_if_all_values_stay_finite(
    dtype: torch.dtype, size: float, scaling: float
) -> None:
    small, large = torch.tensor([[0.5, -1.0]]), torch.tensor([[0.0], [-size], [size / 2]])
    for lora in (LoRAWeights(small, large, scaling), LoRAWeights(large.T, small.T, scaling)):
        folded = lora.folded()
        finite = all(bool(m.to(dtype).isfinite().all()) for m in (folded.a, folded.b))
        assert lora.fits(dtype) is finite
