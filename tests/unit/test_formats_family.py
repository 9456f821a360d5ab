"""A family on disk: every rule has a bad file, digests hold anywhere, PEFT loads it as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from format_files import (
    BASE,
    RECIPE,
    SITES,
    edit_json,
    ramp,
    random_adapter,
    saved_family,
    tiny_family,
    tiny_llama,
    tiny_lora,
)

from safegene_vllm.composition import merge_into
from safegene_vllm.errors import (
    DigestError,
    FormatError,
    HeaderError,
    MissingFileError,
    NonFiniteError,
    PickleRejectedError,
    SafegeneError,
    ShapeError,
    SiteError,
    TruncatedFileError,
    VersionError,
)
from safegene_vllm.formats.adapter import LoRAWeights
from safegene_vllm.formats.family import (
    Base,
    SelectedLayer,
    base_of_checkpoint,
    load_family,
    make_family,
    read_family_header,
    save_family,
)
from safegene_vllm.formats.safetensors_file import read_tensors, serialize

ROOT = Path(__file__).parents[2]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    saved_family(tmp_path / "family")
    return tmp_path / "family"


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda directory: edit_json(directory / "safegene.json", change)


def base(**fields: Any) -> Callable[[Path], None]:
    return edit(lambda d: d["base"].update(fields))


def text(old: str, new: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        path = directory / "safegene.json"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    return damage


BAD: dict[str, tuple[Callable[[Path], Any], type[SafegeneError], str]] = {
    "no description": (lambda d: (d / "safegene.json").unlink(), MissingFileError, "safegene"),
    "description cut": (text('"digest"', ""), HeaderError, "JSON"),
    "duplicate key": (text('"kind"', '"name": "x", "kind"'), HeaderError, "'name' occurs twice"),
    "NaN": (text("0.25", "NaN"), NonFiniteError, "NaN"),
    "not UTF-8": (
        lambda d: (d / "safegene.json").write_bytes(b'{"name": "\xff"}'),
        HeaderError,
        "utf-8",
    ),
    "wrong kind": (edit(lambda d: d.update(kind="profile")), HeaderError, "'profile', expected"),
    "no kind": (edit(lambda d: d.pop("kind")), HeaderError, "None, expected 'family'"),
    "version 2": (edit(lambda d: d.update(format_version=2)), VersionError, "is 2.*reads 1"),
    "version true": (edit(lambda d: d.update(format_version=True)), VersionError, "True"),
    "unknown key": (edit(lambda d: d.update(color="red")), HeaderError, "'color'"),
    "missing key": (edit(lambda d: d.pop("recipe")), HeaderError, "'recipe' is missing"),
    "wrong type": (edit(lambda d: d.update(layers={})), HeaderError, "expected a list"),
    "two errors": (
        edit(lambda d: (d.pop("recipe"), d.update(color=1))),
        HeaderError,
        "(?s)2 errors.*'color'.*'recipe'",
    ),
    "empty name": (edit(lambda d: d.update(name="")), HeaderError, "name is empty"),
    "digest no digest": (edit(lambda d: d.update(digest="md5:1")), HeaderError, "md5:1"),
    "fingerprint": (base(fingerprint="x"), HeaderError, "fingerprint 'x'"),
    "base unknown key": (base(path="/home"), HeaderError, "'path'"),
    "no layers": (base(num_layers=0), HeaderError, "num_layers is 0"),
    "layer beyond": (base(num_layers=2), HeaderError, r"layer 2 is outside 0\.\.1"),
    "bounds reversed": (edit(lambda d: d["coefficient_bounds"].reverse()), HeaderError, "order"),
    "bounds three": (edit(lambda d: d["coefficient_bounds"].append(4)), HeaderError, "two num"),
    "layers reversed": (edit(lambda d: d["layers"].reverse()), HeaderError, "ascending"),
    "layer twice": (edit(lambda d: d["layers"].append(d["layers"][1])), HeaderError, "each once"),
    "layer text": (edit(lambda d: d["layers"].append("3")), HeaderError, "'3' is not"),
    "layer no score": (edit(lambda d: d["layers"][0].pop("score")), HeaderError, "is not"),
    "layer without weights": (
        edit(lambda d: d["layers"].insert(1, {"layer": 1, "score": None})),
        SiteError,
        "layer 1 has no weights",
    ),
    "weights without layer": (edit(lambda d: d["layers"].pop()), SiteError, "layer 2 has weights"),
    "weights missing": (
        lambda d: (d / "adapter_model.safetensors").unlink(),
        MissingFileError,
        "adapter_model",
    ),
    "weights a pickle": (
        lambda d: (d / "adapter_model.safetensors").rename(d / "adapter_model.bin"),
        PickleRejectedError,
        "pickle runs code",
    ),
    "scaled": (
        lambda d: edit_json(d / "adapter_config.json", lambda c: c.update(lora_alpha=16)),
        HeaderError,
        "alpha equals r",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_family_has_a_named_error(saved: Path, case: str) -> None:
    damage, error, says = BAD[case]
    damage(saved)
    for read in (read_family_header, load_family):
        with pytest.raises(error, match=says) as caught:
            read(saved)
        assert type(caught.value) is error


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.3, 0.6, 0.99])
def test_a_cut_weights_file_is_truncated(saved: Path, fraction: float) -> None:
    path = saved / "adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(TruncatedFileError):
        read_family_header(saved)


def flip_weight(directory: Path, place: int) -> None:
    path = directory / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("place", [-1, -4, -57])
def test_one_flipped_bit_of_a_tensor_is_found(saved: Path, place: int) -> None:
    flip_weight(saved, place)
    read_family_header(saved)
    with pytest.raises(DigestError, match="fetch the family again"):
        load_family(saved)
    load_family(saved, verify_digest=False)


def test_a_value_that_is_not_finite_is_found_whatever_the_digest(saved: Path) -> None:
    path = saved / "adapter_model.safetensors"
    tensors = read_tensors(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    path.write_bytes(serialize(tensors))
    with pytest.raises(NonFiniteError):
        load_family(saved, verify_digest=False)


def other_digest(d: dict[str, Any]) -> None:
    d["digest"] = d["digest"][:-1] + ("0" if d["digest"][-1] != "0" else "1")


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(name="tinier"),
        lambda d: d["base"].update(architecture="OtherForCausalLM"),
        lambda d: d["base"].update(fingerprint="sha256:" + "00" * 32),
        lambda d: d["layers"][0].update(score=0.5),
        lambda d: d.update(coefficient_bounds=[0.0, 30.0]),
        lambda d: d["recipe"].update(seed=8),
        other_digest,
    ],
)
def test_the_digest_covers_every_field(saved: Path, change: Callable[[Any], Any]) -> None:
    edit(change)(saved)
    with pytest.raises(DigestError):
        load_family(saved)


def test_own_fields_and_whole_numbers_do_not_touch_the_digest(saved: Path) -> None:
    edit(lambda d: d.update(x_note="ours", coefficient_bounds=[0, 3]))(saved)
    assert load_family(saved).digest == tiny_family().digest


def test_the_order_of_tensors_in_the_file_does_not_touch_the_digest(saved: Path) -> None:
    path = saved / "adapter_model.safetensors"
    tensors = read_tensors(path)
    header: dict[str, Any] = {}
    data = b""
    for name in sorted(tensors, reverse=True):
        blob = tensors[name].numpy().tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(tensors[name].shape),
            "data_offsets": [len(data), len(data) + len(blob)],
        }
        data += blob
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    assert load_family(saved).digest == tiny_family().digest


def test_saving_and_loading_is_the_identity(saved: Path) -> None:
    made, loaded = tiny_family(), load_family(saved)
    assert loaded.header == made.header == read_family_header(saved)
    assert loaded.header.path == saved
    assert loaded.header.num_layers == 3
    for site, lora in made.lora_weights.items():
        assert loaded.lora_weights[site].scaling == 1.0
        assert torch.equal(loaded.lora_weights[site].a, lora.a)
        assert torch.equal(loaded.lora_weights[site].b, lora.b)


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "other"):
        saved_family(tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()


def test_an_altered_family_is_not_saved(tmp_path: Path) -> None:
    family = tiny_family()
    altered = replace(family, header=replace(family.header, bounds=(0.0, 30.0)))
    with pytest.raises(DigestError, match="make it again"):
        save_family(altered, tmp_path / "family")
    family.lora_weights[SITES[0]].a[0, 0] += 1
    with pytest.raises(DigestError, match="make it again"):
        save_family(family, tmp_path / "family")
    assert list(tmp_path.iterdir()) == []


def test_a_family_is_overwritten_as_a_whole(saved: Path) -> None:
    other = saved_family(saved, layers=[SelectedLayer(2, 1.0)])
    loaded = load_family(saved)
    assert loaded.digest == other.digest != tiny_family().digest
    assert set(loaded.lora_weights) == {SITES[2]}


def test_a_failed_save_leaves_the_old_family(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(os, "replace", fail)
        saved_family(saved, bounds=(0.0, 1.0))
    assert [p.name for p in saved.parent.iterdir()] == ["family"]
    assert load_family(saved).digest == tiny_family().digest


def test_a_directory_with_other_files_is_not_overwritten(saved: Path) -> None:
    (saved / "report.md").write_text("mine")
    with pytest.raises(FormatError, match=r"report\.md"):
        saved_family(saved)


def test_all_layers_with_weights_are_selected_by_default() -> None:
    assert tiny_family(layers=None).header.layers == (SelectedLayer(0), SelectedLayer(2))
    one = tiny_family(layers=[SelectedLayer(0, 0.25)])
    assert set(one.lora_weights) == {SITES[0], SITES[1]}


def test_a_scaling_is_folded_into_the_family() -> None:
    lora = tiny_lora()
    lora_weights = {SITES[0]: LoRAWeights(lora.a, lora.b, 2.0)}
    family = make_family("f", BASE, lora_weights, recipe={}, dtype=torch.bfloat16)
    made = family.lora_weights[SITES[0]]
    assert made.scaling == 1.0
    assert made.b.dtype == made.a.dtype == torch.bfloat16
    assert torch.equal(made.b.float(), 2 * lora.b)
    assert family.header.sites[SITES[0]].dtype == "BF16"


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"layers": [SelectedLayer(1)]}, SiteError, "layer 1 has no weights"),
        ({"layers": [SelectedLayer(2), SelectedLayer(0)]}, HeaderError, "ascending"),
        ({"layers": []}, SiteError, "no LoRA weights"),
        ({"bounds": (3.0, 0.0)}, HeaderError, "order"),
        ({"bounds": (0.0, float("nan"))}, NonFiniteError, "finite"),
        ({"recipe": {"seed": {1}}}, HeaderError, "recipe"),
        ({"recipe": {"loss": float("inf")}}, NonFiniteError, "recipe"),
        ({"dtype": torch.float64}, HeaderError, "F64"),
    ],
)
def test_a_bad_family_cannot_be_made(changes: dict[str, Any], error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        tiny_family(**changes)


@pytest.mark.parametrize(
    ("site", "lora", "error", "says"),
    [
        ("lm_head", tiny_lora(), SiteError, "in no layer"),
        ("model.layers.3.q_proj", tiny_lora(), HeaderError, "outside"),
        (SITES[0], LoRAWeights(ramp(1, 2) / 0, ramp(2, 1)), NonFiniteError, "NaN or Inf"),
        (SITES[0], LoRAWeights(torch.ones(1, 2), torch.ones(0, 1)), ShapeError, "none of them 0"),
    ],
)
def test_bad_lora_weights_make_no_family(
    site: str, lora: LoRAWeights, error: type, says: str
) -> None:
    with pytest.raises(error, match=says):
        make_family("f", BASE, {site: lora}, recipe=RECIPE)


def python(code: str, **environment: str) -> str:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_digest_is_the_same_in_another_process() -> None:
    code = "from format_files import tiny_family; print(tiny_family().digest)"
    assert python(code, PYTHONHASHSEED="1234") == tiny_family().digest


def test_headers_are_read_without_torch(saved: Path) -> None:
    code = (
        "import sys\n"
        "import safegene_vllm, safegene_vllm.formats.profile\n"
        "from safegene_vllm.formats.adapter import read_adapter_shapes\n"
        "from safegene_vllm.formats.family import read_family_header\n"
        f"read_adapter_shapes({str(saved)!r}); read_family_header({str(saved)!r})\n"
        "print({'torch', 'vllm', 'fastapi', 'transformers', 'numpy'} & set(sys.modules))"
    )
    assert python(code) == "set()"


def test_peft_loads_a_family_as_it_is_at_coefficient_one(tmp_path: Path) -> None:
    from peft import PeftModel

    model = tiny_llama()
    lora_weights = random_adapter(
        model, {"q_proj": 3, "o_proj": 3, "gate_proj": 2, "down_proj": 4}
    ).lora_weights
    family = make_family("tiny", replace(BASE, num_layers=2), lora_weights, recipe={})
    save_family(family, tmp_path / "family")

    tokens = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        plain = model(tokens).logits
        merged = tiny_llama()
        for site, lora in family.lora_weights.items():
            module: Any = merged.get_submodule(site)
            module.weight.data = merge_into(module.weight.data, lora, 1.0)
        expected = merged(tokens).logits
        loaded: Any = PeftModel.from_pretrained(model, str(tmp_path / "family"))
        found = loaded(tokens).logits
    assert not torch.allclose(plain, expected, atol=1e-2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# The base a family belongs to.


def checkpoint(directory: Path, **options: Any) -> Path:
    model = tiny_llama()
    model.to(options.pop("dtype", torch.float32)).save_pretrained(directory, **options)
    return directory


def test_the_fingerprint_ignores_path_dtype_values_shards_and_vocabulary(tmp_path: Path) -> None:
    base = base_of_checkpoint(checkpoint(tmp_path / "one"))
    assert (base.architecture, base.num_layers) == ("LlamaForCausalLM", 2)
    assert base_of_checkpoint(checkpoint(tmp_path / "bf16", dtype=torch.bfloat16)) == base
    sharded = checkpoint(tmp_path / "sharded", max_shard_size="20KB")
    assert (sharded / "model.safetensors.index.json").exists()
    assert base_of_checkpoint(sharded) == base

    weights = tmp_path / "one" / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    tensors["model.embed_tokens.weight"] = torch.zeros(70, 32)
    tensors["model.layers.0.mlp.up_proj.weight"] += 1
    safetensors.torch.save_file(tensors, weights)
    assert base_of_checkpoint(tmp_path / "one") == base

    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(40, 32)
    safetensors.torch.save_file(tensors, weights)
    assert base_of_checkpoint(tmp_path / "one") != base


def test_the_fingerprint_follows_the_written_rule(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"architectures": ["A"], "text_config": {"num_hidden_layers": 1}}'
    )
    weights = {
        "model.layers.0.q.weight": torch.ones(3, 2),
        "model.layers.0.norm.weight": ramp(1, 2)[0],
    }
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    # printf '{"architecture":"A","sites":{"model.layers.0.q":[3,2]}}' | sha256sum
    expected = "sha256:af5589a4fd1359d896114113d127f91ede4ab8ebc900d963ec12628efb95642e"
    assert base_of_checkpoint(tmp_path) == Base("A", 1, expected)


def index(weight_map: Any) -> Callable[[Path], Any]:
    def damage(directory: Path) -> None:
        (directory / "model.safetensors").rename(directory / "shard.safetensors")
        text = json.dumps({"weight_map": weight_map})
        (directory / "model.safetensors.index.json").write_text(text)

    return damage


def settings(**fields: Any) -> Callable[[Path], Any]:
    return lambda d: edit_json(d / "config.json", lambda c: c.update(fields))


def quantized(directory: Path) -> None:
    """As AutoAWQ writes it: packed integers in place of each weight."""
    packed = {"model.layers.0.mlp.up_proj.qweight": torch.ones(2, 2, dtype=torch.int32)}
    safetensors.torch.save_file(packed, directory / "model.safetensors")
    settings(quantization_config={"quant_method": "awq", "bits": 4})(directory)


@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (lambda d: (d / "config.json").unlink(), MissingFileError, "config.json"),
        (lambda d: (d / "model.safetensors").unlink(), MissingFileError, "neither"),
        (
            lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
            PickleRejectedError,
            "only pickles",
        ),
        (settings(architectures=None), HeaderError, "architectures"),
        (settings(num_hidden_layers=0), HeaderError, "num_hidden_layers"),
        (index({}), HeaderError, "weight_map"),
        (index({"a": "../shard.safetensors"}), HeaderError, "not the name of a file"),
        (index({"a": "shard.safetensors"}), SiteError, "it is not there"),
        (index({"a": "none.safetensors"}), MissingFileError, "none"),
        (
            lambda d: safetensors.torch.save_file(
                {"lm_head.weight": torch.ones(3, 2)}, d / "model.safetensors"
            ),
            SiteError,
            "no 2-D weight",
        ),
        (quantized, SiteError, r"is quantized \('awq'\).*unquantized checkpoint"),
    ],
)
def test_a_bad_checkpoint_has_a_named_error(
    tmp_path: Path, damage: Callable[[Path], Any], error: type, says: str
) -> None:
    directory = checkpoint(tmp_path / "model")
    damage(directory)
    with pytest.raises(error, match=says):
        base_of_checkpoint(directory)
