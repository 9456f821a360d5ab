"""A LoRA that PEFT loads as its own, the same bytes for the same seed, stopped or not."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from recipe_setup import GOOD, TASK, tiny_chat_model
from transformers import AutoModelForCausalLM

from safegene_vllm.errors import ConfigError, FormatError
from safegene_vllm.formats.adapter import load_adapter
from safegene_vllm.formats.safetensors_file import read_tensors
from safegene_vllm.recipe.encoding import Example, collate, encode
from safegene_vllm.recipe.finetune import FineTune, completion_loss, fine_tune
from safegene_vllm.recipe.model import load_model
from safegene_vllm.tiny_model import linear_sites

EXAMPLES = [Example(row.prompt, row.answer or "") for row in (*GOOD.rows, *TASK.rows)]
SHORT = FineTune(steps=6, lr=1e-2, batch=4, rank=4, alpha=8)
IDS = torch.arange(3, 27).reshape(2, 12)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of SHORT, run without a stop."""
    out = tmp_path_factory.mktemp("made") / "lora"
    tune(model, out)
    return out


def tune(model: Path, out: Path, settings: FineTune = SHORT, **options: object) -> list[float]:
    return fine_tune(model, EXAMPLES, settings, out, dtype=torch.float32, **options)  # type: ignore[arg-type]


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def stop_after(step: int):  # type: ignore[no-untyped-def]
    def progress(done: int, total: int, words: str) -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGINT)

    return progress


# The result


SCALED = {"rslora": True, "alpha_pattern": {"down_proj": 32}, "modules": ("down_proj", "o_proj")}


@pytest.mark.parametrize(("arch", "changes"), [("llama", SCALED), ("phi3", {}), ("glm4", {})])
def test_peft_loads_it_and_computes_the_same(
    tmp_path: Path, arch: str, changes: dict[str, object]
) -> None:
    model = tiny_chat_model(tmp_path / "model", arch)
    tune(model, tmp_path / "lora", replace(SHORT, steps=3, **changes))  # type: ignore[arg-type]
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    plain = base(IDS).logits.detach()
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "lora")).eval()(IDS).logits.detach()
    ours = load_model(model, tmp_path / "lora", dtype=torch.float32).model(IDS).logits
    size = float(theirs.abs().max())
    assert float((theirs - plain).abs().max()) > 0.01 * size
    torch.testing.assert_close(ours, theirs, atol=2e-5 * size, rtol=0)


def test_every_linear_module_of_the_layers_is_trained_unless_some_are_named(
    model: Path, made: Path, tmp_path: Path
) -> None:
    lora_weights = load_adapter(made).lora_weights
    assert set(lora_weights) == set(linear_sites(model))
    assert all(
        lora.rank == 4 and lora.scaling == 2.0 and lora.b.any() for lora in lora_weights.values()
    )
    tune(model, tmp_path / "lora", replace(SHORT, modules=("q_proj",)))
    assert {site.rpartition(".")[2] for site in load_adapter(tmp_path / "lora").lora_weights} == {
        "q_proj"
    }
    with pytest.raises(ConfigError, match=r"no module is called \['x_proj'\]; there are \['down"):
        tune(model, tmp_path / "other", replace(SHORT, modules=("q_proj", "x_proj")))


def test_it_is_small_and_holds_nothing_of_this_machine(
    model: Path, made: Path, tmp_path: Path
) -> None:
    tensors = read_tensors(made / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    config = json.loads((made / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None
    assert str(model.parent) not in (made / "adapter_config.json").read_text()
    tune(model, tmp_path / "named", replace(SHORT, steps=1), base_model="tiny")
    assert load_adapter(tmp_path / "named").base_model == "tiny"


def test_the_loss_falls(model: Path, tmp_path: Path) -> None:
    losses = tune(model, tmp_path / "lora", replace(SHORT, steps=20, batch=16))
    assert len(losses) == 20 and losses[-1] < 0.3 * losses[0]
    before, after = (
        load_model(model, adapter, dtype=torch.float32) for adapter in (None, tmp_path / "lora")
    )
    rows = encode(before.tokenizer, EXAMPLES, max_answer_tokens=64, context_tokens=512)
    batch = collate(rows, before.pad)
    # The first loss is the untouched model's: the LoRA begins as nothing.
    assert completion_loss(before.model, batch).item() == pytest.approx(losses[0], rel=1e-4)
    assert completion_loss(after.model, batch).item() < 0.3 * losses[0]


def test_every_example_weighs_the_same(model: Path) -> None:
    """Against a loop over single rows with transformers' own logits."""
    loaded = load_model(model, dtype=torch.float32)
    examples = [Example("a", "y"), Example("b" * 30, "no " * 9), Example("cc", "maybe")]
    rows = encode(loaded.tokenizer, examples, max_answer_tokens=20, context_tokens=512)
    means = []
    for row in rows:
        ids = torch.tensor([row.ids])
        labels = ids.clone()
        labels[:, : row.prompt_tokens] = -100
        means.append(loaded.model(ids, labels=labels).loss.item())
    found = completion_loss(loaded.model, collate(rows, loaded.pad)).item()
    assert found == pytest.approx(sum(means) / 3, rel=1e-5)


# The same again


def test_the_seed_decides_the_bytes(model: Path, made: Path, tmp_path: Path) -> None:
    tune(model, tmp_path / "again")
    assert files(tmp_path / "again") == files(made)
    tune(model, tmp_path / "other", replace(SHORT, seed=1))
    weights = "adapter_model.safetensors"
    assert files(tmp_path / "other")[weights] != files(made)[weights]
    # Where it begins is the seed's as well: after a step over all rows, A is as it was drawn.
    begins = []
    for seed in (0, 1):
        tune(model, tmp_path / f"{seed}", replace(SHORT, steps=1, batch=16, seed=seed))
        begins.append(load_adapter(tmp_path / f"{seed}").lora_weights)
    assert not any(torch.equal(lora.a, begins[1][site].a) for site, lora in begins[0].items())


@pytest.mark.parametrize("step", [1, 3, 6])
def test_stopped_and_taken_up_it_is_the_same_bytes(
    model: Path, made: Path, tmp_path: Path, step: int
) -> None:
    out = tmp_path / "lora"
    with pytest.raises(KeyboardInterrupt):
        tune(model, out, progress=stop_after(step))
    assert not out.exists() and (tmp_path / "lora.partial").is_dir()
    tune(model, out)
    assert files(out) == files(made)
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


def test_what_a_models_dropout_draws_follows_from_seed_and_step(made: Path, tmp_path: Path) -> None:
    model, weights = tiny_chat_model(tmp_path / "model"), "adapter_model.safetensors"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    tune(model, tmp_path / "alone")
    assert files(tmp_path / "alone")[weights] != files(made)[weights], "it is dropped out"
    with pytest.raises(KeyboardInterrupt):
        tune(model, tmp_path / "lora", progress=stop_after(3))
    torch.rand(7)
    tune(model, tmp_path / "lora")
    assert files(tmp_path / "lora") == files(tmp_path / "alone")


def test_a_run_with_other_settings_data_or_model_is_not_taken_up(
    model: Path, made: Path, tmp_path: Path
) -> None:
    out = tmp_path / "lora"
    with pytest.raises(KeyboardInterrupt):
        tune(model, out, progress=stop_after(3))
    before = files(tmp_path / "lora.partial")
    tiny_chat_model(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"lora\.partial holds an unfinished run"):
        tune(tmp_path / "other", out)
    with pytest.raises(ConfigError, match=r"lora\.partial holds an unfinished run"):
        tune(model, out, replace(SHORT, lr=2e-2))
    with pytest.raises(ConfigError, match=r"lora\.partial holds an unfinished run"):
        fine_tune(model, EXAMPLES[:-1], SHORT, out, dtype=torch.float32)
    assert files(tmp_path / "lora.partial") == before and not out.exists()
    tune(model, out)
    assert files(out) == files(made)


def test_a_result_that_cannot_be_written_is_not_lost(
    model: Path, made: Path, tmp_path: Path
) -> None:
    out = tmp_path / "lora"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FormatError, match=r"notes\.txt"):
        tune(model, out)
    (out / "notes.txt").unlink()
    tune(model, out, progress=lambda done, total, words: pytest.fail("trained again"))
    assert files(out) == files(made)


# What is rejected


@pytest.mark.parametrize(
    "changes", [{"steps": 0}, {"batch": 0}, {"rank": 0}, {"max_answer_tokens": 0}, {"lr": 0.0}]
)
def test_settings_out_of_range_are_rejected_at_once(changes: dict[str, int]) -> None:
    (name,) = changes
    with pytest.raises(ConfigError, match=f"{name} is 0"):
        replace(SHORT, **changes)  # type: ignore[arg-type]


def test_no_examples_and_too_long_ones_are_rejected(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="empty"):
        fine_tune(model, [], SHORT, tmp_path / "x")
    with pytest.raises(ConfigError, match=r"row 2 \(\d+ \+ 2 tokens\)"):
        fine_tune(model, [EXAMPLES[0], Example("x" * 600, "y")], SHORT, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
