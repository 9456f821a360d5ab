"""The transformers backend is the merged model: token for token, one target after another."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from recipe_setup import tiny_chat_model
from reference_engine import reference
from safetensors.torch import load_file, save_file

from safegene_vllm.chat import completion_text, load_tokenizer, prompt_tokens, truncate_at_stop
from safegene_vllm.composition import delta
from safegene_vllm.errors import ConfigError, SiteError
from safegene_vllm.evaluation.backends import TransformersBackend
from safegene_vllm.evaluation.targets import Target, before_and_after
from safegene_vllm.formats.adapter import Adapter, save_adapter
from safegene_vllm.formats.family import load_family
from safegene_vllm.formats.profile import make_profile, save_profile
from safegene_vllm.tiny_model import linear_sites, random_lora_weights, write_family, write_tenant

PROMPTS = ["What is it?", "Tell me", "a much longer question about nothing at all", "x"]
TOKENS = 10
PARENT = Target("model", "parent")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("backends")
    model = tiny_chat_model(root / "model")
    family = write_family(model, root / "family")
    write_tenant(model, root / "acme", family, [0.5, 1.0], seed=3)
    write_tenant(model, root / "bare", family, [1.5, 0.2], adapter=False)
    shutil.copytree(model, root / "full")
    tensors = load_file(model / "model.safetensors")
    for site, lora in random_lora_weights(linear_sites(model), 2, 5).items():
        tensors[f"{site}.weight"] = tensors[f"{site}.weight"] + delta(lora, 0.5)
    save_file(tensors, root / "full" / "model.safetensors", metadata={"format": "pt"})
    save_profile(make_profile(family.header, [0.9, 0.4]), root / "full")
    for name in ("acme", "full"):
        shutil.copytree(root / name, root / f"{name}_scaled")
        save_profile(make_profile(family.header, [0.1, 2.0]), root / f"{name}_scaled")
        shutil.copytree(root / name, root / f"{name}_plain")
        (root / f"{name}_plain" / "safegene.json").unlink()
    return root


def backend_of(root: Path, **more: object) -> TransformersBackend:
    family = load_family(root / "family")
    return TransformersBackend(root / "model", family, dtype="float32", batch=3, **more)


def expected(root: Path, model: str, tenant: str | None) -> list[str]:
    """Completions of the merged float32 model, one prompt at a time, with another code."""
    tokenizer = load_tokenizer(root / model)
    rows = prompt_tokens(tokenizer, PROMPTS)
    where = None if tenant is None else root / tenant
    found = reference(root / model, root / "family", where, rows, TOKENS)
    return [
        completion_text(tokenizer, truncate_at_stop(completion.tokens, [2])) for completion in found
    ]


def test_every_state_is_the_merged_model(root: Path) -> None:
    """Interleaved, so that nothing of one target stays in the weights of the next."""
    header = load_family(root / "family").header
    acme_before, acme_after = before_and_after("acme", root / "acme", header)
    full_before, full_after = before_and_after("full", root / "full", header)
    cases = [
        (acme_after, "model", "acme"),
        (PARENT, "model", None),
        (full_after, "full", "full"),
        (acme_before, "model", "acme_plain"),
        (Target("acme", "scaled", root / "acme", (0.1, 2.0)), "model", "acme_scaled"),
        (full_before, "full_plain", None),
        (Target("base", "scaled", None, (1.5, 0.2)), "model", "bare"),
        (Target("bare", "after", root / "bare"), "model", "bare"),
        (acme_after, "model", "acme"),
    ]
    ours = backend_of(root)
    completions = []
    for target, model, tenant in cases:
        found = ours.generate(PROMPTS, target, TOKENS)
        assert found == expected(root, model, tenant), target
        completions.append(tuple(found))
    assert len(set(completions)) == 7, "all targets but two pairs differ"
    ours.close()
    assert ours.generate(PROMPTS, PARENT, TOKENS) == list(completions[1]), "closing forgets nothing"


def test_bfloat16_rounds_the_merged_weight_once(root: Path) -> None:
    ours = TransformersBackend(root / "model", load_family(root / "family"), batch=3)
    assert (ours.dtype, ours.backend, ours.model) == ("bfloat16", "transformers", root / "model")
    ours.generate(["x"], Target("base", "scaled", None, (1.5, 0.2)), 1)
    assert ours._loaded is not None
    family = load_family(root / "family")
    stored = load_file(root / "model" / "model.safetensors")
    site = "model.layers.0.mlp.up_proj"
    whole = stored[f"{site}.weight"] + delta(family.lora_weights[site], 1.5)
    weight = dict(ours._loaded.model.named_modules())[site].weight
    assert torch.equal(weight, whole.to(torch.bfloat16))


def test_sites_that_the_model_lacks(root: Path, tmp_path: Path) -> None:
    lora_weights = random_lora_weights(
        {"model.layers.0.mlp.nothing": (8, 8), "lm_head": (320, 128)}, 2, 1
    )
    save_adapter(Adapter(lora_weights, None, {}), tmp_path / "odd", base_model="tiny")
    target = Target("odd", "before", tmp_path / "odd")
    with pytest.raises(SiteError, match=r"no linear model\.layers\.0\.mlp\.nothing"):
        backend_of(root).generate(["x"], target, 1)


def test_settings_that_cannot_be(root: Path) -> None:
    with pytest.raises(ConfigError, match="dtype is 'int8', expected one of float32"):
        TransformersBackend(root / "model", dtype="int8")
    with pytest.raises(ConfigError, match="device 'nowhere' cannot be used"):
        TransformersBackend(root / "model", device="nowhere")
