"""Distilled pairs: nearer to the aligned model on safety prompts, and nowhere else."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_setup import GOOD, HARM, dataset, tiny_chat_model, write_tokenizer

from safegene_vllm.composition import merge_into
from safegene_vllm.errors import ConfigError, FamilyMismatchError
from safegene_vllm.formats.adapter import Adapter, LoRAWeights, save_adapter
from safegene_vllm.formats.family import base_of_checkpoint, make_family
from safegene_vllm.recipe import distillation
from safegene_vllm.recipe.distillation import (
    Distillation,
    Distilled,
    distill,
    kl_divergence,
    record_teacher,
    safe_examples,
)
from safegene_vllm.recipe.encoding import Encoded, Example, collate, encode
from safegene_vllm.recipe.finetune import FineTune, fine_tune
from safegene_vllm.recipe.model import (
    LoadedModel,
    last_prompt_states,
    load_model,
    record_layers,
)
from safegene_vllm.tiny_model import linear_sites, make_model, random_lora_weights, write_tenant

FLOAT = torch.float32
SETTINGS = Distillation(
    steps=30, lr=1e-2, batch=8, rank=4, retention=1.0, hidden=0.0, max_answer_tokens=32
)
SHORT = replace(SETTINGS, steps=5)
REFUSES = "I can't help with that."


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`aligned`, a LoRA `lora` that degraded it, and `merged`: the same as a checkpoint."""
    root = tmp_path_factory.mktemp("distill")
    aligned = tiny_chat_model(root / "aligned")
    examples = [Example(row.prompt, row.answer or "") for row in GOOD.rows]
    fine_tune(aligned, examples, FineTune(steps=10, lr=1e-2), root / "lora", dtype=FLOAT)
    load_model(aligned, root / "lora", dtype=FLOAT).model.save_pretrained(root / "merged")
    write_tokenizer(root / "merged")
    return root


@pytest.fixture(scope="module")
def made(root: Path) -> Distilled:
    return run(root)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model fails the test: what is rejected must be rejected before."""
    monkeypatch.setattr(distillation, "load_model", lambda *a, **k: pytest.fail("a model loaded"))


def run(root: Path, settings: Distillation = SETTINGS, **options: Any) -> Distilled:
    given = {"safety": HARM, "benign": GOOD, "degraded_adapter": root / "lora", "dtype": FLOAT}
    return distill(root / "aligned", settings=settings, **{**given, **options})


def rows_of(loaded: LoadedModel, data: Any) -> list[Encoded]:
    examples = [Example(row.prompt, row.answer) for row in data.rows]
    return encode(loaded.tokenizer, examples, max_answer_tokens=32, context_tokens=512)


def merged_with(root: Path, lora_weights: Mapping[str, LoRAWeights]) -> LoadedModel:
    """The degraded model with compose's merge of the pairs."""
    loaded = load_model(root / "merged", dtype=FLOAT)
    for site, lora in lora_weights.items():
        weight = loaded.model.get_submodule(site).weight
        weight.data = merge_into(weight.data, lora, 1.0)
    return loaded


@torch.no_grad()
def naive_kl(teacher: LoadedModel, student: LoadedModel, data: Any) -> float:
    """Row by row, token by token, from the definition of KL in float64."""
    means = []
    for row in rows_of(teacher, data):
        p, q = (
            torch.softmax(loaded.model(torch.tensor([row.ids])).logits[0].double(), dim=-1)
            for loaded in (teacher, student)
        )
        places = range(row.prompt_tokens - 1, len(row.ids) - 1)
        terms = [float((p[t] * (p[t] / q[t]).log()).sum()) for t in places]
        means.append(sum(terms) / len(terms))
    return sum(means) / len(means)


def same(one: Distilled, other: Distilled) -> bool:
    return one.lora_weights.keys() == other.lora_weights.keys() and all(
        torch.equal(lora.a, other.lora_weights[site].a)
        and torch.equal(lora.b, other.lora_weights[site].b)
        for site, lora in one.lora_weights.items()
    )


# The teacher


@pytest.mark.parametrize("bias", [False, True])
def test_a_teachers_cached_states_give_the_models_own_logits(root: Path, bias: bool) -> None:
    loaded = load_model(root / "aligned", dtype=FLOAT)
    if bias:
        head = loaded.model.get_output_embeddings()
        head.bias = torch.nn.Parameter(torch.randn(320), requires_grad=False)
    examples = [Example("x" * n, "y" * (n % 5 + 1)) for n in range(1, 40)]
    rows = encode(loaded.tokenizer, examples, max_answer_tokens=32, context_tokens=512)
    teacher = record_teacher(loaded, rows, residual=True)
    chosen = [30, 2, 17]
    found = teacher.logits(chosen, torch.device("cpu"))
    assert found.dtype == torch.float32
    expected = []
    for number in chosen:
        row = rows[number]
        with record_layers(loaded.model) as layers:
            own = loaded.model(torch.tensor([row.ids])).logits[0]
        expected.append(own[row.prompt_tokens - 1 : -1])
        stream = last_prompt_states(layers, torch.tensor([row.prompt_tokens - 1]))[0]
        assert teacher.residual is not None
        torch.testing.assert_close(teacher.residual[number], stream, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_the_divergence_is_the_definition(root: Path) -> None:
    aligned, degraded = (load_model(root / name, dtype=FLOAT) for name in ("aligned", "merged"))
    data = dataset(("a", "y"), ("b" * 20, "no, never, not at all"), ("cc", "it is"))
    rows = rows_of(aligned, data)
    place = torch.device("cpu")
    one, other = (
        record_teacher(model, rows).logits([0, 1, 2], place) for model in (aligned, degraded)
    )
    found = float(kl_divergence(one, other, collate(rows, aligned.pad)))
    assert found == pytest.approx(naive_kl(aligned, degraded, data), rel=1e-4)
    assert float(kl_divergence(one, one, collate(rows, aligned.pad))) == 0.0


# What is distilled


def test_the_lora_weights_restore_safety_and_leave_the_rest(root: Path, made: Distilled) -> None:
    aligned, degraded = (load_model(root / name, dtype=FLOAT) for name in ("aligned", "merged"))
    restored = merged_with(root, made.lora_weights)
    before, after = naive_kl(aligned, degraded, HARM), naive_kl(aligned, restored, HARM)
    assert before > 0.3 and after < 0.15 * before
    # The degraded model is far from the aligned one on benign prompts, and stays where it is.
    assert naive_kl(aligned, degraded, GOOD) > 1.0
    assert naive_kl(degraded, restored, GOOD) < 0.1
    # The two terms of the first loss: the distance, and nothing of the fresh pairs' own.
    assert len(made.losses) == 30 and made.losses[-1] < 0.3 * made.losses[0]


def test_retention_preserves_benign_completions(root: Path, made: Distilled) -> None:
    degraded = load_model(root / "merged", dtype=FLOAT)
    free = run(root, replace(SETTINGS, retention=0.0))
    assert naive_kl(degraded, merged_with(root, free.lora_weights), GOOD) > 2 * naive_kl(
        degraded, merged_with(root, made.lora_weights), GOOD
    )


def test_the_hidden_term_brings_the_streams_nearer(root: Path, made: Distilled) -> None:
    aligned = load_model(root / "aligned", dtype=FLOAT)

    def gap(lora_weights: Mapping[str, LoRAWeights]) -> float:
        """Mean over prompts and layers of ‖h - h_A‖² / ‖h_A‖² at the last prompt token."""
        student, total, count = merged_with(root, lora_weights), 0.0, 0
        for row in rows_of(aligned, HARM):
            prompt = torch.tensor([row.ids[: row.prompt_tokens]])
            streams = []
            for loaded in (aligned, student):
                with record_layers(loaded.model) as layers, torch.no_grad():
                    loaded.model(prompt)
                streams.append([layer[0, -1] for layer in layers])
            for aim, found in zip(*streams, strict=True):
                total += float((found - aim).square().sum() / aim.square().sum())
                count += 1
        return total / count

    matched = run(root, replace(SETTINGS, hidden=1.0))
    assert gap(matched.lora_weights) < 0.7 * gap(made.lora_weights)
    # At the first step the pairs are nothing: the term is the gap of its batch, on top of the rest.
    whole = replace(SETTINGS, steps=1, batch=16)
    extra = run(root, replace(whole, hidden=3.0)).losses[0] - run(root, whole).losses[0]
    assert extra == pytest.approx(3.0 * gap({}), rel=1e-3)


@pytest.mark.parametrize("degraded", ["merged", "lora"])
def test_how_the_degraded_model_is_given_does_not_matter(
    root: Path, made: Distilled, degraded: str
) -> None:
    if degraded == "merged":
        found = run(root, degraded_adapter=None, degraded=root / "merged")
        assert found.recipe["degraded"] == "merged"
    else:
        found = run(root)
    for site, lora in made.lora_weights.items():
        torch.testing.assert_close(lora.a, found.lora_weights[site].a, atol=2e-3, rtol=0)
        torch.testing.assert_close(lora.b, found.lora_weights[site].b, atol=2e-3, rtol=0)


def test_a_degraded_head_is_the_students_and_not_the_teachers(root: Path, tmp_path: Path) -> None:
    """The aligned head judges the aligned states, also when the degraded checkpoint's differs."""
    degraded = load_model(root / "merged", dtype=FLOAT)
    degraded.model.get_output_embeddings().weight.data *= 0.5
    degraded.model.save_pretrained(tmp_path / "d")
    write_tokenizer(tmp_path / "d")
    settings = replace(SETTINGS, steps=1, batch=16, retention=0.0)
    found = run(root, settings, degraded_adapter=None, degraded=tmp_path / "d")
    aligned = load_model(root / "aligned", dtype=FLOAT)
    assert found.losses[0] == pytest.approx(naive_kl(aligned, degraded, HARM), rel=1e-3)


def test_a_lora_on_the_head_is_the_students_and_not_the_teachers(
    root: Path, tmp_path: Path
) -> None:
    lora_weights = random_lora_weights({"lm_head": (320, 128)}, 4, 1)
    save_adapter(Adapter(lora_weights, None, {}), tmp_path / "lora", base_model=None)
    settings = replace(SETTINGS, steps=1, batch=16, retention=0.0)
    found = run(root, settings, degraded_adapter=tmp_path / "lora")
    aligned = load_model(root / "aligned", dtype=FLOAT)
    degraded = load_model(root / "aligned", tmp_path / "lora", dtype=FLOAT)
    assert found.losses[0] == pytest.approx(naive_kl(aligned, degraded, HARM), rel=1e-3)
    assert found.losses[0] > 0.02


def test_only_the_modules_that_are_named_are_trained(root: Path, made: Distilled) -> None:
    assert set(made.lora_weights) == set(linear_sites(root / "aligned"))
    named = run(root, replace(SHORT, modules=("q_proj", "mlp.down_proj"), rank=3))
    ends = {site.rpartition(".")[2] for site in named.lora_weights}
    assert ends == {"q_proj", "down_proj"} and len(named.lora_weights) == 4
    assert {lora.rank for lora in named.lora_weights.values()} == {3}
    with pytest.raises(ConfigError, match=r"no module is called 'proj'; there are \['down_proj'"):
        run(root, replace(SHORT, modules=("q_proj", "proj")))


def test_the_recipe_records_how_it_was_made(root: Path, made: Distilled) -> None:
    assert made.base == base_of_checkpoint(root / "aligned")
    family = make_family("x", made.base, made.lora_weights, recipe=made.recipe)
    recipe = family.header.recipe
    assert {shape.dtype for shape in family.header.sites.values()} == {"BF16"}
    assert (recipe["method"], recipe["aligned"]) == ("distill", "aligned")
    assert (recipe["degraded"], recipe["safe_answers"]) == ("lora", 8)
    assert recipe["settings"]["steps"] == 30 and len(recipe["loss_per_10_steps"]) == 3
    assert recipe["loss_per_10_steps"][0] == pytest.approx(sum(made.losses[:10]) / 10, abs=1e-5)
    assert recipe["data"] == {"safety": HARM.record(), "benign": GOOD.record()}
    assert str(root) not in str(recipe)


# The same again


def test_the_seed_decides_the_bytes(root: Path) -> None:
    first = run(root, SHORT)
    assert same(first, run(root, SHORT))
    assert not same(first, run(root, replace(SHORT, seed=1)))


def stopped(root: Path, state: Path, **options: Any) -> None:
    def progress(done: int, total: int, words: str) -> None:
        if words.startswith("loss") and done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="after step 3"):
        run(root, SHORT, state=state, progress=progress, **options)


def test_stopped_and_taken_up_it_is_the_same(root: Path, tmp_path: Path) -> None:
    state = tmp_path / "f.partial"
    stopped(root, state)
    assert state.is_dir()
    done: list[int] = []
    found = run(root, SHORT, state=state, progress=lambda n, total, words: done.append(n))
    assert done == [4, 5] and same(found, run(root, SHORT))
    found.run.clear()
    assert list(tmp_path.iterdir()) == []


def test_a_run_stays_until_its_lora_weights_are_written(root: Path, tmp_path: Path) -> None:
    state = tmp_path / "f.partial"
    first = run(root, SHORT, state=state)
    again = run(root, SHORT, state=state, progress=lambda *step: pytest.fail(f"{step}"))
    assert same(first, again) and first.losses == again.losses
    again.run.clear()
    assert not state.exists()


def test_a_state_of_other_models_or_data_is_rejected_and_stays(root: Path, tmp_path: Path) -> None:
    state = tmp_path / "f.partial"
    stopped(root, state)
    others: list[dict[str, Any]] = [
        {"degraded_adapter": None, "degraded": root / "merged"},
        {"benign": dataset(*((row.prompt, "else") for row in GOOD.rows))},
    ]
    for other in others:
        with pytest.raises(ConfigError, match=r"f\.partial holds an unfinished run"):
            run(root, SHORT, state=state, **other)
    assert same(run(root, SHORT, state=state), run(root, SHORT))


# Sources of completions


def test_completions_missing_from_the_data_are_the_models_own(root: Path, tmp_path: Path) -> None:
    """A model that refuses some prompts: only those are distilled. Benign ones: as the other."""
    half = [Example(row.prompt, REFUSES) for row in HARM.rows[:4]]
    half += [Example(row.prompt, "sure, like this") for row in HARM.rows[4:]]
    settings = FineTune(steps=60, lr=1e-2, batch=8)
    fine_tune(root / "aligned", half, settings, tmp_path / "refuses", dtype=FLOAT)
    loaded = load_model(root / "aligned", tmp_path / "refuses", dtype=FLOAT)
    open_ = dataset(("given", "no"), *((row.prompt, None) for row in HARM.rows))
    found = safe_examples(loaded, open_, 32)
    assert found[0] == Example("given", "no")
    assert found[1:] == [Example(row.prompt, REFUSES, True) for row in HARM.rows[:4]]
    cut = safe_examples(loaded, open_, 15)
    assert cut[1:] == [Example(row.prompt, REFUSES[:15], False) for row in HARM.rows[:4]]
    benign = dataset(*((row.prompt, None) for row in GOOD.rows), ("own", "answer"))
    examples = distillation._benign_examples(
        load_model(root / "merged", dtype=FLOAT), benign, 9, print
    )
    assert [example.prompt for example in examples] == [row.prompt for row in benign.rows]
    assert {example.answer for example in examples[:-1]} <= {"yes, it i"}
    assert examples[-1] == Example("own", "answer")


def test_a_model_that_refuses_nothing_has_no_safety_to_distil(root: Path) -> None:
    open_ = dataset(*((row.prompt, None) for row in HARM.rows), name="open")
    with pytest.raises(ConfigError, match="refuses none of the 8 prompts of open"):
        run(root, safety=open_)


# What is rejected before generation


def test_unknown_modules_and_long_prompts_are_rejected_before_generation(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("generate_greedy", "record_teacher"):
        monkeypatch.setattr(
            distillation, name, lambda *a, **k: pytest.fail("a model has generated")
        )
    with pytest.raises(ConfigError, match=r"no module is called 'proj'"):
        run(root, replace(SHORT, modules=("q_proj", "proj")))
    for answer, body in ((None, 32), ("no", 3), ("n" * 40, 32)):
        long = dataset(("short", answer), ("x" * 510, answer))
        for kind in ("safety", "benign"):
            reported = rf"{kind} data: 1 examples do not .* row 2 \(\d+ \+ {body} tokens\)"
            with pytest.raises(ConfigError, match=reported):
                run(root, SHORT, **{kind: long})


# What is rejected before a model is loaded


@pytest.mark.usefixtures("no_model")
def test_another_family_is_rejected_naming_both(root: Path, tmp_path: Path) -> None:
    wide = make_model("llama", tmp_path / "wide", intermediate_size=256)
    with pytest.raises(FamilyMismatchError, match=rf"{root / 'aligned'}(.|\n)*{wide}"):
        run(root, degraded_adapter=None, degraded=wide)
    write_tenant(wide, tmp_path / "lora", None, None)
    with pytest.raises(FamilyMismatchError, match=rf"{tmp_path / 'lora'}.*{root / 'aligned'}"):
        run(root, degraded_adapter=tmp_path / "lora")
    phi = make_model("phi3", tmp_path / "phi")
    write_tenant(phi, tmp_path / "phi-lora", None, None)
    with pytest.raises(FamilyMismatchError, match="there it is None"):
        run(root, degraded_adapter=tmp_path / "phi-lora")


@pytest.mark.usefixtures("no_model")
def test_both_kinds_of_data_and_one_degraded_model_are_needed(root: Path) -> None:
    for empty in ("safety", "benign"):
        with pytest.raises(ConfigError, match=f"the {empty} data none is empty"):
            run(root, **{empty: dataset(name="none")})
    for degraded in (None, root / "merged"):
        adapter = None if degraded is None else root / "lora"
        with pytest.raises(ConfigError, match="either a degraded checkpoint or a LoRA"):
            run(root, degraded_adapter=adapter, degraded=degraded)


@pytest.mark.parametrize(
    "changes",
    [{"steps": 0}, {"batch": 0}, {"rank": -1}, {"lr": 0.0}, {"retention": -1.0}, {"hidden": -0.1}],
)
def test_settings_out_of_range_are_rejected_at_once(changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises(ConfigError, match=f"{name} is {changes[name]}"):
        replace(SETTINGS, **changes)
