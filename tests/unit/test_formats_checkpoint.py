"""Tensors of a checkpoint: one file or shards, read one at a time, errors by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from safegene_vllm.errors import (
    FormatError,
    HeaderError,
    MissingFileError,
    PickleRejectedError,
    ShapeError,
    SiteError,
)
from safegene_vllm.formats.checkpoint import read_checkpoint
from safegene_vllm.tiny_model import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("llama"), dtype="bfloat16")


def sharded(model: Path, directory: Path) -> Path:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    loaded.save_pretrained(directory, max_shard_size="100KB")
    return directory


def test_one_file_and_shards_read_the_same(model: Path, tmp_path: Path) -> None:
    single, shards = read_checkpoint(model), read_checkpoint(sharded(model, tmp_path / "s"))
    assert len(single.shards) == 1 < len(shards.shards)
    assert single.infos.keys() == shards.infos.keys()
    for name, tensor in load_file(model / "model.safetensors").items():
        assert torch.equal(single.read(name), tensor)
        assert torch.equal(shards.read(name), tensor)


def test_reading_headers_allocates_no_tensor_and_unknown_names_are_errors(model: Path) -> None:
    with pytest.raises(SiteError, match="no tensor 'nowhere'"):
        read_checkpoint(model).read("nowhere")


def test_quantized_tensors_are_listed_but_not_read(tmp_path: Path) -> None:
    save_file({"q": torch.zeros(2, 2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.infos["q"].dtype == "I8"
    with pytest.raises(ShapeError, match="before quantization"):
        checkpoint.read("q")


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("model.safetensors.index.json", {"weight_map": {}}, HeaderError),
        ("model.safetensors.index.json", {"weight_map": {"a": "../up.safetensors"}}, HeaderError),
        ("model.safetensors.index.json", {"weight_map": {"a": "s.safetensors"}}, SiteError),
        (
            "model.safetensors.index.json",
            {"weight_map": {"w": "s.safetensors", "v": "t.safetensors"}},
            HeaderError,
        ),
        ("pytorch_model.bin", {}, PickleRejectedError),
        ("other.json", {}, MissingFileError),
    ],
)
def test_every_broken_layout_is_one_named_error(
    tmp_path: Path, name: str, content: object, error: type[FormatError]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"w": torch.zeros(1)}, tmp_path / "s.safetensors")
    save_file({"w": torch.zeros(1), "v": torch.zeros(1)}, tmp_path / "t.safetensors")
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(error):
        read_checkpoint(tmp_path)
