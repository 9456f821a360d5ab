"""SaLoRA starts at W, stays away from harmful directions, and serves what it trained."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from recipe_setup import tiny_chat_model
from transformers import AutoModelForCausalLM

from benchmarks.safety_utility import salora
from safegene_vllm.chat import prompt_tokens
from safegene_vllm.composition import delta
from safegene_vllm.errors import ConfigError
from safegene_vllm.formats.adapter import Adapter, LoRAWeights, load_adapter, save_adapter
from safegene_vllm.recipe.encoding import Example
from safegene_vllm.recipe.model import LoadedModel, load_model, merge_lora_weights

HARMFUL = ["break in", "steal it", "harm them", "burn it all", "how to rob"]
EXAMPLES = [Example(f"say {word}", word) for word in ("red", "blue", "green", "black", "white")]
SETTINGS = salora.SaLoRA(
    steps=6, lr=2e-2, batch=3, rank=3, safety_rank=5, task_rank=6, modules=("q_proj", "up_proj")
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_model(tmp_path_factory.mktemp("salora") / "model")


def dense(lora: LoRAWeights) -> torch.Tensor:
    return delta(lora, 1.0).double()


def loaded(model_dir: Path) -> LoadedModel:
    return load_model(model_dir, device="cpu", dtype=torch.float32)


def logits(model: LoadedModel, prompts: list[str] = HARMFUL) -> torch.Tensor:
    ids = prompt_tokens(model.tokenizer, prompts)
    with torch.no_grad():
        return torch.cat([model.model(torch.tensor([row])).logits[0] for row in ids])


def moved(model: LoadedModel) -> salora.Guarded:
    """Attached and moved: as after some steps, without a loss."""
    guarded = salora.prepared(model, SETTINGS, HARMFUL, [e.prompt for e in EXAMPLES])
    generator = torch.Generator().manual_seed(3)
    for half in guarded.parameters().values():
        half.data += 0.2 * torch.randn(half.shape, generator=generator)
    return guarded


def test_directions_are_the_leading_singular_vectors_of_the_outputs(model_dir: Path) -> None:
    model = loaded(model_dir)
    sites = salora.linear_sites(model.model, ("up_proj",))
    found = salora.output_directions(model, HARMFUL, sites, 5)
    outputs: list[torch.Tensor] = []
    site = next(iter(sites))
    handle = sites[site].register_forward_hook(lambda m, i, out: outputs.append(out[0].detach()))
    logits(model)
    handle.remove()
    expected = torch.linalg.svd(torch.cat(outputs).double().T)[0][:, :5].float()
    overlap = (found[site].T @ expected).abs()
    torch.testing.assert_close(overlap, torch.eye(5), rtol=0, atol=1e-3)
    everything = salora.output_directions(model, HARMFUL[:1], sites, 500)[site]
    (ids,) = prompt_tokens(model.tokenizer, HARMFUL[:1])
    assert everything.shape[1] <= len(ids), "directions without any output are no directions"


def test_training_starts_at_w_with_the_published_factors(model_dir: Path) -> None:
    model = loaded(model_dir)
    plain = logits(model)
    tasks = [example.prompt for example in EXAMPLES]
    guarded = salora.prepared(model, SETTINGS, HARMFUL, tasks)
    with guarded.on(model.model):
        assert torch.equal(logits(model), plain)
    sites = salora.linear_sites(model.model, SETTINGS.modules)
    assert set(guarded.a) == set(sites) and len(sites) == 4
    bases = salora.output_directions(model, tasks, sites, SETTINGS.task_rank)
    for site, module in sites.items():
        u, s, vt = torch.linalg.svd(module.weight.double())
        best = (u[:, :3] * s[:3]) @ vt[:3]
        v_t = bases[site].double()
        torch.testing.assert_close(
            guarded.b0[site].double() @ guarded.a0[site].double(),
            v_t @ v_t.T @ best,
            rtol=1e-4,
            atol=1e-5,
        )
        grams = [guarded.a0[site] @ guarded.a0[site].T, torch.diag(s[:3].float())]
        torch.testing.assert_close(*grams, rtol=1e-4, atol=1e-4)


def test_the_exported_lora_on_w_is_the_trained_module(model_dir: Path, tmp_path: Path) -> None:
    model = loaded(model_dir)
    plain = logits(model)
    guarded = moved(model)
    with guarded.on(model.model):
        expected = logits(model)
    assert (expected - plain).abs().max() > 0.1
    lora_weights = guarded.lora_weights()
    assert {lora.rank for lora in lora_weights.values()} == {2 * SETTINGS.rank}
    for name, form in (
        ("literal", lora_weights),
        ("balanced", {site: salora.balanced(lora) for site, lora in lora_weights.items()}),
    ):
        save_adapter(Adapter(form, None, {}), tmp_path / name, base_model="tiny")
        served = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32), tmp_path / name
        )
        other = LoadedModel(served, model.tokenizer, model.device)
        torch.testing.assert_close(logits(other), expected, rtol=1e-4, atol=1e-4)
    merge_lora_weights(model.model, lora_weights, "the exported LoRA")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_nothing_is_added_along_the_directions_of_harmful_prompts(model_dir: Path) -> None:
    guarded = moved(loaded(model_dir))
    for site, lora in guarded.lora_weights().items():
        added = dense(lora)
        along = guarded.safety[site].double().T @ added
        assert along.norm() < 1e-4 * added.norm()


def test_balanced_factors_survive_bfloat16(model_dir: Path) -> None:
    guarded = salora.prepared(loaded(model_dir), SETTINGS, HARMFUL, HARMFUL)
    for half in guarded.parameters().values():
        half.data *= 1.001

    def error(lora: LoRAWeights) -> float:
        narrow = LoRAWeights(lora.a.bfloat16(), lora.b.bfloat16())
        return ((dense(narrow) - dense(lora)).norm() / dense(lora).norm()).item()

    for lora in guarded.lora_weights().values():
        assert error(salora.balanced(lora)) < 0.02 < 0.2 < error(lora)


def test_salora_trains_with_the_recipes_loop_and_writes_a_lora(
    model_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "salora"
    losses = salora.train_salora(
        model_dir, EXAMPLES, HARMFUL, SETTINGS, out, base_model="tiny", dtype=torch.float32
    )
    assert len(losses) == SETTINGS.steps and losses[-1] < losses[0]
    assert not out.with_name("salora.partial").exists()
    made = load_adapter(out)
    assert made.base_model == "tiny" and len(made.lora_weights) == 4
    assert {lora.rank for lora in made.lora_weights.values()} == {6}
    model = loaded(model_dir)
    bases = salora.output_directions(
        model, HARMFUL, salora.linear_sites(model.model, SETTINGS.modules), SETTINGS.safety_rank
    )
    for site, lora in made.lora_weights.items():
        added = dense(lora)
        assert added.norm() > 0
        assert (bases[site].double().T @ added).norm() < 1e-4 * added.norm()


def test_an_interrupted_run_is_not_resumed_for_other_weights(
    model_dir: Path, tmp_path: Path
) -> None:
    base, out = tmp_path / "model", tmp_path / "salora"
    shutil.copytree(model_dir, base)

    def train(**more: Any) -> list[float]:
        return salora.train_salora(
            base, EXAMPLES, HARMFUL, SETTINGS, out, device="cpu", dtype=torch.float32, **more
        )

    def stop(done: int, total: int, words: str) -> None:
        if done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(progress=stop)
    weights = base / "model.safetensors"
    modified = weights.stat().st_mtime_ns
    os.utime(weights, ns=(modified + 1, modified + 1))
    with pytest.raises(ConfigError, match=r"salora\.partial holds an unfinished run"):
        train()
    os.utime(weights, ns=(modified, modified))
    assert len(train()) == SETTINGS.steps and not out.with_name("salora.partial").exists()


def test_wrong_settings_are_reported(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no prompts given"):
        salora.train_salora(model_dir, EXAMPLES, [], SETTINGS, tmp_path / "a", device="cpu")
    wrong = replace(SETTINGS, modules=("q_proj", "nothing"))
    with pytest.raises(ConfigError, match="nothing"):
        salora.train_salora(model_dir, EXAMPLES, HARMFUL, wrong, tmp_path / "b", device="cpu")
