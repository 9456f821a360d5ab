"""Engines that must not start: every way a vector could silently fail to be there.

The real vLLM up to the error, which is the one an operator reads.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reference_engine import engine
from safetensors.torch import load_file

import safegene_vllm
from safegene_vllm.errors import (
    BoundsError,
    ConfigError,
    DigestError,
    FamilyMismatchError,
    MissingFileError,
    NonFiniteError,
    PickleRejectedError,
    TruncatedFileError,
    VllmCompatibilityError,
)
from safegene_vllm.formats.adapter import LoRAWeights
from safegene_vllm.formats.family import load_family, make_family, save_family
from safegene_vllm.formats.profile import Profile, make_profile, save_profile
from safegene_vllm.plugin import compat
from safegene_vllm.plugin.preflight import prepare_engine
from safegene_vllm.tiny_model import make_model, write_family

pytestmark = pytest.mark.engine

PACKAGE = Path(safegene_vllm.__file__).parent
LOAD_PLUGINS = "from vllm.plugins import load_general_plugins as load; load(); print('served on')"


@pytest.fixture(scope="module")
def setup_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("start")
    model = make_model("llama", root / "model")
    write_family(model, root / "family")
    return root


def rejected_start(
    setup_dir: Path, family: Path, error: type[Exception], words: str, **options: Any
) -> None:
    settings = {"family": str(family), **options.pop("settings", {})}
    with (
        pytest.raises(error, match=words),
        engine(options.pop("model", setup_dir / "model"), settings, **options),
    ):
        pass


def test_family_missing(setup_dir: Path, tmp_path: Path) -> None:
    rejected_start(setup_dir, tmp_path / "nowhere", ConfigError, "not a directory")
    (tmp_path / "empty").mkdir()
    rejected_start(setup_dir, tmp_path / "empty", MissingFileError, r"safegene\.json")


def test_family_of_another_base(setup_dir: Path, tmp_path: Path) -> None:
    other = make_model("qwen2", tmp_path / "other")
    family = write_family(other, tmp_path / "family")
    rejected_start(
        setup_dir, tmp_path / "family", FamilyMismatchError, family.header.base.fingerprint
    )


def test_family_truncated_flipped_pickled_or_nan(setup_dir: Path, tmp_path: Path) -> None:
    weights = "adapter_model.safetensors"
    for name in ("truncated", "flipped", "pickled"):
        shutil.copytree(setup_dir / "family", tmp_path / name)
    data = (setup_dir / "family" / weights).read_bytes()
    (tmp_path / "truncated" / weights).write_bytes(data[:-7])
    (tmp_path / "flipped" / weights).write_bytes(data[:-7] + bytes([data[-7] ^ 1]) + data[-6:])
    (tmp_path / "pickled" / weights).rename(tmp_path / "pickled" / "adapter_model.bin")
    rejected_start(setup_dir, tmp_path / "truncated", TruncatedFileError, weights)
    rejected_start(setup_dir, tmp_path / "flipped", DigestError, "sha256")
    rejected_start(setup_dir, tmp_path / "pickled", PickleRejectedError, "safetensors")


def test_family_with_nan(setup_dir: Path, tmp_path: Path) -> None:
    """Written by another tool: ours rejects it at saving."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(setup_dir / "family", tmp_path / "nan")
    path = tmp_path / "nan" / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path)
    rejected_start(setup_dir, tmp_path / "nan", NonFiniteError, "lora_[AB]")


def test_family_that_overflows_in_the_models_dtype(setup_dir: Path, tmp_path: Path) -> None:
    """Finite in its file, as float32."""
    lora_weights = {
        s: LoRAWeights(p.a, p.b * 1e9)
        for s, p in load_family(setup_dir / "family").lora_weights.items()
    }
    header = load_family(setup_dir / "family").header
    large = make_family(
        "large", header.base, lora_weights, bounds=(0.0, 3.0), recipe={"method": "test"}
    )
    save_family(large, tmp_path / "large")
    rejected_start(
        setup_dir,
        tmp_path / "large",
        VllmCompatibilityError,
        "overflows torch.float16",
        dtype="float16",
    )


def test_family_with_sites_the_engine_does_not_adapt(setup_dir: Path) -> None:
    rejected_start(
        setup_dir,
        setup_dir / "family",
        VllmCompatibilityError,
        "lora-target-modules",
        lora_target_modules=["o_proj"],
    )


def test_weight_load_of_another_shape_or_without_a_profile(setup_dir: Path, tmp_path: Path) -> None:
    weights = {"settings": {"apply": "weights"}}
    rejected_start(setup_dir, setup_dir / "family", MissingFileError, r"safegene\.json", **weights)
    other = make_model("llama", tmp_path / "wide", intermediate_size=256)
    header = load_family(setup_dir / "family").header
    save_profile(make_profile(header, 1.0), other)
    rejected_start(
        setup_dir,
        setup_dir / "family",
        FamilyMismatchError,
        "intermediate|sha256",
        model=other,
        **weights,
    )


def test_a_site_missing_from_the_checkpoint(setup_dir: Path, tmp_path: Path) -> None:
    """A family whose fingerprint matches but whose sites are not all there."""
    full = load_family(setup_dir / "family")
    lora_weights = dict(full.lora_weights)
    lora_weights["model.layers.0.mlp.extra_proj"] = lora_weights.pop("model.layers.0.mlp.up_proj")
    family = make_family("odd", full.header.base, lora_weights, recipe={})
    save_family(family, tmp_path / "odd")
    shutil.copytree(setup_dir / "model", tmp_path / "full")
    save_profile(make_profile(family.header, 1.0), tmp_path / "full")
    rejected_start(
        setup_dir, tmp_path / "odd", FamilyMismatchError, "extra_proj",
        model=tmp_path / "full", settings={"apply": "weights"},
    )  # fmt: skip


def test_a_draft_model_alone_is_read_without_the_vector(
    setup_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the path of the other: weights of the served model may be of a second one."""
    from safegene_vllm.plugin.model_loader import SafegeneModelLoader

    stored = load_file(next((setup_dir / "model").glob("*.safetensors")))
    theirs = SafegeneModelLoader.__mro__[1]
    monkeypatch.setattr(theirs, "get_all_weights", lambda *_: iter(stored.items()))
    loader = object.__new__(SafegeneModelLoader)
    loader._family = load_family(setup_dir / "family")
    loader._profile = make_profile(loader._family.header, 1.0)
    sites = {f"{site}.weight" for site in loader._family.lora_weights}
    for runner_type, changed in (("generate", sites), ("draft", set())):
        config = SimpleNamespace(runner_type=runner_type, model="elsewhere")
        found = dict(loader.get_all_weights(config, model := SimpleNamespace()))
        assert {n for n, w in found.items() if not torch.equal(w, stored[n])} == changed
        assert hasattr(model, "safegene_merged") == bool(changed)


@pytest.mark.parametrize(
    ("row", "error", "words"),
    [
        ([-0.5, 1.0], BoundsError, "-0.5"),
        ([0.5], BoundsError, "1"),
        ([9.0, 1.0], BoundsError, "9"),
    ],
)
def test_base_profile_out_of_bounds(
    setup_dir: Path, tmp_path: Path, row: list[float], error: type[Exception], words: str
) -> None:
    family = load_family(setup_dir / "family")
    save_profile(Profile(family.digest, tuple(row)), tmp_path / "base")
    settings = {"base_profile": str(tmp_path / "base")}
    rejected_start(setup_dir, setup_dir / "family", error, words, settings=settings)


def test_lora_switched_off(setup_dir: Path) -> None:
    rejected_start(
        setup_dir, setup_dir / "family", VllmCompatibilityError, "--enable-lora", enable_lora=False
    )


def fake_config(setup_dir: Path, **changes: Any) -> Any:
    """Just what the option check reads; the real object is used in every other test here."""
    flat = {
        "fully_sharded": False, "pipeline": 1, "sleep": False, "runner": "generate",
        "quantization": None, "load_format": "auto", "lora": True, "transfer": None,
        "elastic": False, "fast_prefill": False, "default_mm": None, **changes,
    }  # fmt: skip
    apply = "weights" if flat["load_format"] == "safegene" else "gain"
    return SimpleNamespace(
        additional_config={"safegene": {"family": str(setup_dir / "family"), "apply": apply}},
        load_config=SimpleNamespace(load_format=flat["load_format"]),
        weight_transfer_config=flat["transfer"],
        lora_config=SimpleNamespace(
            fully_sharded_loras=flat["fully_sharded"], default_mm_loras=flat["default_mm"]
        )
        if flat["lora"]
        else None,
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=flat["fast_prefill"]),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=flat["pipeline"], enable_elastic_ep=flat["elastic"]
        ),
        model_config=SimpleNamespace(
            model=str(flat.get("model", setup_dir / "model")),
            enable_sleep_mode=flat["sleep"],
            runner_type=flat["runner"],
            quantization=flat["quantization"],
            hf_config=SimpleNamespace(architectures=["LlamaForCausalLM"]),
        ),
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fully_sharded": True}, "fully-sharded"),
        ({"pipeline": 2}, "pipeline-parallel"),
        ({"sleep": True}, "sleep-mode"),
        ({"fast_prefill": True}, "--kv-sharing-fast-prefill"),
        ({"runner": "pooling"}, "--runner pooling"),
        ({"transfer": object()}, "--weight-transfer-config"),
        ({"elastic": True}, "--enable-elastic-ep"),
        ({"default_mm": {"audio": "/adapters/audio"}}, "--default-mm-loras"),
    ],
)
def test_options_that_cannot_be_honoured(setup_dir: Path, changes: dict, words: str) -> None:
    prepare_engine(fake_config(setup_dir))
    with pytest.raises(VllmCompatibilityError, match=words):
        prepare_engine(fake_config(setup_dir, **changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantization": "fp8"}, "quantized"),
        ({}, "--enable-lora"),
        ({"transfer": object()}, "--weight-transfer-config"),
        ({"elastic": True}, "--enable-elastic-ep"),
        ({"runner": "draft"}, "--runner draft"),
    ],
)
def test_weight_load_with_what_it_cannot_be_combined_with(
    setup_dir: Path, tmp_path: Path, changes: dict, words: str
) -> None:
    shutil.copytree(setup_dir / "model", tmp_path / "full")
    save_profile(make_profile(load_family(setup_dir / "family").header, 1.0), tmp_path / "full")
    config = fake_config(setup_dir, load_format="safegene", model=tmp_path / "full", **changes)
    with pytest.raises(VllmCompatibilityError, match=words):
        prepare_engine(config)


def test_dual_stream(setup_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LORA_ENABLE_DUAL_STREAM", "1")
    with pytest.raises(VllmCompatibilityError, match="DUAL_STREAM"):
        prepare_engine(fake_config(setup_dir))


@pytest.mark.parametrize("load_format", ["auto", "safegene"])
def test_names_that_vllm_does_not_check(
    setup_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load_format: str
) -> None:
    shutil.copytree(setup_dir / "model", tmp_path / "full")
    save_profile(make_profile(load_family(setup_dir / "family").header, 1.0), tmp_path / "full")
    changes = {"load_format": load_format, "model": tmp_path / "full"}
    config = fake_config(setup_dir, lora=load_format == "auto", **changes)
    prepare_engine(config)
    monkeypatch.setenv("VLLM_SKIP_MODEL_NAME_VALIDATION", "1")
    with pytest.raises(VllmCompatibilityError, match="SKIP_MODEL_NAME_VALIDATION"):
        prepare_engine(config)


def test_unsupported_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("0.27.1", "0.33.0", "nonsense"):
        monkeypatch.setattr(compat, "version", lambda version=version: version)
        with pytest.raises(VllmCompatibilityError, match=version):
            compat.check_vllm()


def test_a_vllm_without_an_integration_point(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = compat.VllmName("vllm.lora.request.LoRARequest", ("no_such_field",), "a test")
    monkeypatch.setitem(compat.TABLE, "LoRARequest", entry)
    with pytest.raises(VllmCompatibilityError, match="no_such_field"):
        compat.check_vllm()
    missing = compat.VllmName("vllm.lora.request.Missing", (), "a test")
    monkeypatch.setitem(compat.TABLE, "Missing", missing)
    with pytest.raises(VllmCompatibilityError, match=r"vllm\.lora\.request\.Missing"):
        compat.check_vllm()


def broken_copy(tmp_path: Path, module: str) -> dict[str, str]:
    """An environment in which one module of our package cannot be imported."""
    shutil.copytree(PACKAGE, tmp_path / "safegene_vllm", ignore=shutil.ignore_patterns("*.pyc"))
    (tmp_path / "safegene_vllm" / module).write_text("raise ImportError('broken on purpose')\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path}


def test_import_broken_inside_the_package_stops_vllm(tmp_path: Path) -> None:
    environment = broken_copy(tmp_path, "plugin/worker_runtime.py")
    done = subprocess.run(
        [sys.executable, "-c", LOAD_PLUGINS],
        env=environment, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert "served on" not in done.stdout
    assert "broken on purpose" in done.stderr


def test_a_broken_plugin_entry_point_is_caught_by_the_worker_extension(tmp_path: Path) -> None:
    """vLLM only logs this one; a worker whose configuration needs the plugin does not start."""
    environment = broken_copy(tmp_path, "plugin/__init__.py")
    extension = "import safegene_vllm.plugin.worker_extension"
    done = subprocess.run(
        [sys.executable, "-c", f"{LOAD_PLUGINS}; {extension}"],
        env=environment, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert "served on" in done.stdout, "vLLM now stops by itself: the extension can be removed"
    assert done.returncode != 0


def test_a_plugin_list_without_us_is_caught_by_the_worker_extension() -> None:
    code = f"{LOAD_PLUGINS}; import safegene_vllm.plugin.worker_extension"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "VLLM_PLUGINS": "another_plugin"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert "VLLM_PLUGINS" in done.stderr


def test_settings_name_key_value_and_expectation(setup_dir: Path) -> None:
    from safegene_vllm.settings import parse_settings

    with pytest.raises(ConfigError, match=r"safegene\.famly.*Known keys: family"):
        parse_settings({"safegene": {"famly": "x"}})
    with pytest.raises(ConfigError, match=r"safegene\.apply = 'magic'"):
        parse_settings({"safegene": {"family": str(setup_dir), "apply": "magic"}})
    with pytest.raises(ConfigError, match="go together"):
        parse_settings({"safegene": {"family": str(setup_dir), "apply": "weights"}})
    with pytest.raises(ConfigError, match="needs"):
        parse_settings({}, load_format="safegene")
    with pytest.raises(ConfigError, match="expected an object"):
        parse_settings({"safegene": json.dumps({"family": "x"})})
    assert parse_settings({}) is None
