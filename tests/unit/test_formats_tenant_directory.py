"""Kinds of directories, and their match with a family."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from safegene_vllm.errors import (
    AdapterRejectedError,
    FamilyMismatchError,
    HeaderError,
    MissingFileError,
)
from safegene_vllm.formats.adapter import Adapter, save_adapter
from safegene_vllm.formats.family import FamilyHeader
from safegene_vllm.formats.safetensors_file import read_tensors, serialize
from safegene_vllm.formats.tenant_directory import RECORD_FILE, check_fits, kind_of, reject_exported
from safegene_vllm.tiny_model import make_model, random_lora_weights, write_family, write_tenant


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tenants")
    model = make_model("llama", root / "checkpoint")
    family = write_family(model, root / "family")
    write_tenant(model, root / "adapter", family, 1.0)
    write_tenant(model, root / "profile", family, 1.0, adapter=False)
    return root


@pytest.fixture(scope="module")
def header(root: Path) -> FamilyHeader:
    from safegene_vllm.formats.family import read_family_header

    return read_family_header(root / "family")


@pytest.mark.parametrize("kind", ["family", "adapter", "checkpoint", "profile"])
def test_every_kind_is_recognized(root: Path, kind: str) -> None:
    assert kind_of(root / kind) == kind


def test_a_directory_that_is_nothing_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(MissingFileError):
            kind_of(path)
    (tmp_path / "safegene.json").write_text('{"kind": "other"}')
    with pytest.raises(HeaderError, match="'other'"):
        kind_of(tmp_path)


@pytest.mark.parametrize("kind", ["adapter", "checkpoint", "profile"])
def test_members_of_the_family_fit(root: Path, header: FamilyHeader, kind: str) -> None:
    check_fits(root / kind, header)


def renamed(source: Path, target: Path, change: Callable[[str], str]) -> Path:
    """A copy of an adapter whose sites have other names."""
    shutil.copytree(source, target)
    file = target / "adapter_model.safetensors"
    file.write_bytes(serialize({change(name): t for name, t in read_tensors(file).items()}))
    return target


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("model.layers.", "model.language_model.layers."),
        ("model.layers.", "inner.layers."),
        ("layers.1.", "layers.17."),
    ],
)
def test_an_adapter_of_modules_that_the_base_lacks_does_not_fit(
    root: Path, header: FamilyHeader, tmp_path: Path, old: str, new: str
) -> None:
    other = renamed(root / "adapter", tmp_path / "other", lambda name: name.replace(old, new))
    with pytest.raises(FamilyMismatchError, match=r"layers 0 to 1 of 'model\.layers' only"):
        check_fits(other, header)


def test_both_spellings_of_a_language_model_fit(
    root: Path, header: FamilyHeader, tmp_path: Path
) -> None:
    new, old = "model.language_model.layers.", "language_model.model.layers."
    sites = {site.replace("model.layers.", new): lora for site, lora in header.sites.items()}
    inside = replace(header, sites=sites)
    for prefix in (new, old):
        adapter = renamed(
            root / "adapter",
            tmp_path / prefix,
            lambda name, prefix=prefix: name.replace("model.model.layers.", f"model.{prefix}"),
        )
        check_fits(adapter, inside)
    with pytest.raises(FamilyMismatchError):
        check_fits(root / "adapter", inside)


def test_others_do_not_and_both_are_named(root: Path, header: FamilyHeader, tmp_path: Path) -> None:
    other = make_model("llama", tmp_path / "wide", intermediate_size=256)
    with pytest.raises(FamilyMismatchError, match=f"{other}.*'tiny'"):
        check_fits(other, header)
    lora_weights = random_lora_weights({"model.layers.0.self_attn.q_proj": (64, 64)}, 2, 1)
    save_adapter(Adapter(lora_weights, None, {}), tmp_path / "small", base_model=None)
    with pytest.raises(FamilyMismatchError, match=r"small.*'tiny'"):
        check_fits(tmp_path / "small", header)
    with pytest.raises(AdapterRejectedError, match="is a family"):
        check_fits(root / "family", header)


def test_an_export_is_rejected(tmp_path: Path) -> None:
    reject_exported(tmp_path)
    (tmp_path / RECORD_FILE).write_text(json.dumps({}))
    with pytest.raises(AdapterRejectedError, match="added twice"):
        reject_exported(tmp_path)
