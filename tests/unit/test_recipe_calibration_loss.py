"""Calibration's loss against a loop over merged weights, its replay and its gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from recipe_setup import dataset, tiny_chat_model, write_tokenizer

from safegene_vllm.composition import merge_into
from safegene_vllm.dataset import Dataset
from safegene_vllm.formats.adapter import layer_of
from safegene_vllm.recipe.attached import AttachedVector
from safegene_vllm.recipe.calibration import LossTerm, _from_layer, _loss_term, batch_loss
from safegene_vllm.recipe.encoding import Encoded, Example, encode
from safegene_vllm.recipe.model import LoadedModel, layer_modules, load_model
from safegene_vllm.tiny_model import linear_sites, make_model, random_lora_weights

FLOAT = torch.float32
IDS = torch.arange(3, 27).reshape(2, 12)


def rows_of(loaded: LoadedModel, data: Dataset) -> list[Encoded]:
    examples = [Example(row.prompt, row.answer or "") for row in data.rows]
    return encode(loaded.tokenizer, examples, max_answer_tokens=24, context_tokens=512)


@pytest.mark.parametrize("kind", ["safety", "task"])
def test_the_loss_is_a_loop_over_merged_weights(tmp_path: Path, kind: str) -> None:
    """Cross-entropy for safety, KL(p_0 ‖ p_λ) else, row by row in float64."""
    path = tiny_chat_model(tmp_path)
    loaded, merged = (load_model(path, dtype=FLOAT) for _ in range(2))
    lora_weights = random_lora_weights(linear_sites(path), 4, 7)
    data = dataset(("a", "yes"), ("b" * 30, "no, never"), ("cc", "it is"))
    rows = rows_of(loaded, data)
    term = _loss_term(loaded, rows, kind, 1.0, 0, 8)
    assert (term.reference is None) is (kind == "safety") and term.prefix == [None]
    attached = AttachedVector(lora_weights, 2)
    attached.coefficients = torch.tensor([0.3, 0.2])
    with attached.applied_to(loaded.model), torch.no_grad():
        found = float(batch_loss(loaded, term, 0, 0))
    for site, lora in lora_weights.items():
        weight = merged.model.get_submodule(site).weight
        weight.data = merge_into(weight.data, lora, (0.3, 0.2)[layer_of(site) or 0])
    means = []
    for row in rows:
        ids = torch.tensor([row.ids])
        p, q = (torch.log_softmax(m.model(ids).logits[0].double(), -1) for m in (loaded, merged))
        places = range(row.prompt_tokens - 1, len(row.ids) - 1)
        if kind == "safety":
            terms = [-float(q[t, row.ids[t + 1]]) for t in places]
        else:
            terms = [float((p[t].exp() * (p[t] - q[t])).sum()) for t in places]
        means.append(sum(terms) / len(terms))
    assert found == pytest.approx(sum(means) / 3, rel=1e-4)
    assert found > 0.02


@pytest.fixture(scope="module", params=["llama", "glm4", "phi3"])
def deep(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Three layers, so that more than one can lie below the vector."""
    path = tmp_path_factory.mktemp("deep") / request.param
    make_model(request.param, path, num_hidden_layers=3)
    write_tokenizer(path)
    return load_model(path, dtype=FLOAT)


def later(loaded: LoadedModel, first: int) -> AttachedVector:
    path = Path(loaded.model.config._name_or_path)
    sites = {s: d for s, d in linear_sites(path).items() if (layer_of(s) or 0) >= first}
    attached = AttachedVector(random_lora_weights(sites, 4, 7, strength=0.3), 3)
    attached.coefficients = torch.tensor([0.0, 0.7, 0.4]).requires_grad_()
    return attached


@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("kind", ["safety", "task"])
def test_layers_below_the_vector_are_not_run_again(
    deep: LoadedModel, first: int, kind: str
) -> None:
    data = dataset(*(("x" * (3 * n), "y" * n) for n in range(1, 6)))
    term = _loss_term(deep, rows_of(deep, data), kind, 1.0, first, 2)
    whole = LossTerm(kind, 1.0, term.batches, term.reference, [None] * 3)
    attached, ran = later(deep, first), list[int]()
    handles = [
        layer.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, layer in enumerate(layer_modules(deep.model))
    ]
    with attached.applied_to(deep.model):
        for number in range(3):
            ran.clear()
            quick = batch_loss(deep, term, number, first)
            assert ran == list(range(first, 3))
            ran.clear()
            full = batch_loss(deep, whole, number, 0)
            assert ran == [0, 1, 2]
            assert torch.equal(quick, full)
            gradients = [torch.autograd.grad(x, attached.coefficients)[0] for x in (quick, full)]
            assert torch.equal(*gradients) and bool(gradients[0][first:].all())
    for handle in handles:
        handle.remove()


def test_layers_run_again_when_the_replay_is_over(deep: LoadedModel) -> None:
    before = deep.model(IDS).logits
    with pytest.raises(KeyError), _from_layer(deep.model, 2, torch.zeros(2, 12, 128)):
        assert not torch.equal(deep.model(IDS).logits, before)
        raise KeyError
    assert torch.equal(deep.model(IDS).logits, before)
    assert not any("forward" in vars(layer) for layer in layer_modules(deep.model))


@pytest.mark.parametrize("kind", ["safety", "task"])
def test_the_gradient_is_what_differences_say(deep: LoadedModel, kind: str) -> None:
    data = dataset(*((f"prompt {n}", "an answer") for n in range(4)))
    term = _loss_term(deep, rows_of(deep, data), kind, 1.0, 1, 4)
    attached = later(deep, 1)
    at = attached.coefficients.detach()
    with attached.applied_to(deep.model):
        (found,) = torch.autograd.grad(batch_loss(deep, term, 0, 1), attached.coefficients)
        for layer in (1, 2):
            losses = []
            for step in (5e-3, -5e-3):
                attached.coefficients = at.clone()
                attached.coefficients[layer] += step
                losses.append(batch_loss(deep, term, 0, 1).item())
            assert found[layer] == pytest.approx((losses[0] - losses[1]) / 1e-2, rel=0.03)
