"""A multimodal base: only its language model has layers, under two spellings of their names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from safegene_vllm.composition import merge_into
from safegene_vllm.export import export_checkpoint
from safegene_vllm.formats.checkpoint import read_checkpoint
from safegene_vllm.formats.family import SelectedLayer, base_of_checkpoint, make_family
from safegene_vllm.formats.profile import make_profile
from safegene_vllm.formats.tensor_names import spellings
from safegene_vllm.recipe.model import layer_modules, linear_modules
from safegene_vllm.tiny_model import random_lora_weights

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    text = {"vocab_size": 64, **SHAPE, **HEADS, "num_key_value_heads": 1, "head_dim": 16}
    config = Gemma3Config(
        text_config=text,
        vision_config={**SHAPE, **HEADS, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=63,
        boi_token_index=62,
        eoi_token_index=61,
    )
    return Gemma3ForConditionalGeneration(config).eval()


def test_the_layers_are_those_of_the_language_model(model: Any) -> None:
    assert layer_modules(model) == list(model.model.language_model.layers)
    names = linear_modules(model)
    assert len(names) == 14
    assert all(name.startswith("model.language_model.layers.") for name in names)


@pytest.mark.parametrize("newer", [False, True])
def test_a_vector_is_merged_under_the_names_of_the_checkpoint(
    model: Any, tmp_path: Path, newer: bool
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    # transformers writes `language_model.model.`, and `model.language_model.` as it is in memory.
    model.save_pretrained(base, save_original_format=not newer)
    lora_weights = random_lora_weights(linear_modules(model), 2, seed=1)
    assert all(site.startswith("model.language_model.") for site in lora_weights)
    family = make_family(
        "gemma",
        base_of_checkpoint(base),
        lora_weights,
        layers=[SelectedLayer(0, None), SelectedLayer(1, None)],
        recipe={},
    )
    exported = export_checkpoint(base, None, family, make_profile(family.header, [0.5, 2.0]), out)
    assert exported.changed == 14
    before, after = (load_file(place / "model.safetensors") for place in (base, out))
    checkpoint = read_checkpoint(base)
    for site, lora in lora_weights.items():
        name = checkpoint.weight_name(site)
        assert name.startswith("model.language_model." if newer else "language_model.model.")
        scaled = replace(lora, scaling=0.5 if ".layers.0." in site else 2.0)
        expected = merge_into(before.pop(name), scaled, 1.0)
        assert torch.equal(after.pop(name), expected)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_other_names_have_one_spelling() -> None:
    assert spellings("model.layers.0.mlp") == ("model.layers.0.mlp",)
    old, new = "language_model.model.layers.1.mlp", "model.language_model.layers.1.mlp"
    assert spellings(old) == (old, new) and spellings(new) == (new, old)
