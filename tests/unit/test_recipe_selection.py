"""Activation contrast against a loop over single prompts on merged weights, and the cut family."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recipe_setup import GOOD, HARM, TASK, dataset, tiny_chat_model

from safegene_vllm.chat import prompt_tokens
from safegene_vllm.composition import merge_into
from safegene_vllm.dataset import Dataset
from safegene_vllm.errors import ConfigError, SiteError
from safegene_vllm.formats.adapter import layer_of
from safegene_vllm.formats.family import Family, load_family, save_family
from safegene_vllm.recipe.model import LoadedModel, load_model
from safegene_vllm.recipe.selection import Contrast, Stream, contrast, select, top_layers
from safegene_vllm.tiny_model import write_family, write_tenant

LONG = dataset(*(("long " * n, None) for n in range(1, 21)), name="long")


@pytest.fixture(scope="module", params=["llama", "glm4", "phi3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_model(tmp_path_factory.mktemp("m") / request.param, request.param)


@pytest.fixture(scope="module")
def degraded(model: Path) -> LoadedModel:
    write_tenant(model, model.parent / "lora", None, None, seed=5)
    return load_model(model, model.parent / "lora", dtype=torch.float32)


@pytest.fixture(scope="module")
def family(model: Path) -> Family:
    return write_family(model, model.parent / "family")


@torch.no_grad()
def streams(loaded: LoadedModel, prompt: str) -> list[torch.Tensor]:
    """The residual stream after each layer at the last token of one prompt, no padding."""
    found: list[torch.Tensor] = []
    handles = [
        layer.register_forward_hook(lambda module, inputs, out: found.append(out[0, -1]))
        for layer in loaded.model.model.layers
    ]
    loaded.model(torch.tensor(prompt_tokens(loaded.tokenizer, [prompt])))
    for handle in handles:
        handle.remove()
    return found


def merged(model: Path, family: Family) -> LoadedModel:
    loaded = load_model(model, model.parent / "lora", dtype=torch.float32)
    for site, lora in family.lora_weights.items():
        weight = loaded.model.get_submodule(site).weight
        weight.data = merge_into(weight.data, lora, 1.0)
    return loaded


def naive(
    plain: LoadedModel, other: LoadedModel, data: list[Dataset], stream: Stream
) -> list[float]:
    rows = []
    for prompt in (row.prompt for one in data for row in one.rows):
        h, g = streams(plain, prompt), streams(other, prompt)
        row = []
        for layer in range(len(h)):
            change = g[layer] - h[layer]
            if stream == "update" and layer:
                change = (g[layer] - g[layer - 1]) - (h[layer] - h[layer - 1])
            row.append(float(change.norm() / h[layer].norm()))
        rows.append(row)
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("stream", ["update", "residual"])
def test_a_contrast_is_what_a_loop_over_merged_models_finds(
    model: Path, degraded: LoadedModel, family: Family, stream: Stream
) -> None:
    found = contrast(
        degraded, family, safety=HARM, others=[GOOD, LONG, TASK], mu=0.5, stream=stream
    )
    other = merged(model, family)
    assert found.safety == pytest.approx(naive(degraded, other, [HARM], stream), rel=1e-3)
    expected = naive(degraded, other, [GOOD, LONG, TASK], stream)
    assert found.others == pytest.approx(expected, rel=1e-3)
    lora_weights = zip(found.safety, found.others, strict=True)
    assert found.scores == pytest.approx([s - 0.5 * o for s, o in lora_weights])
    assert len(found.scores) == 2 and min(found.safety) > 0


def test_the_model_is_left_as_it_was(degraded: LoadedModel, family: Family) -> None:
    ids = torch.arange(3, 20)[None]
    before = degraded.model(ids).logits
    reported: list[tuple[int, int, str]] = []
    contrast(
        degraded, family, safety=HARM, others=[LONG], progress=lambda *words: reported.append(words)
    )
    assert torch.equal(degraded.model(ids).logits, before)
    assert [done for done, _, _ in reported] == [8, 16, 20]


def test_layers_before_the_vector_change_by_nothing(model: Path, degraded: LoadedModel) -> None:
    late = write_family(model, model.parent / "late", layers=[1])
    found = contrast(degraded, late, safety=HARM, others=[GOOD])
    assert found.safety[0] == found.others[0] == 0.0 < found.safety[1]


def test_both_kinds_of_prompts_are_needed(degraded: LoadedModel, family: Family) -> None:
    with pytest.raises(ConfigError, match="0 safety and 8 benign or task prompts"):
        contrast(degraded, family, safety=dataset(), others=[GOOD])
    for others in ([], [dataset()]):
        with pytest.raises(ConfigError, match="8 safety and 0 benign"):
            contrast(degraded, family, safety=HARM, others=others)


def test_prompts_longer_than_the_context_are_named(degraded: LoadedModel, family: Family) -> None:
    long = dataset(("short", None), ("x" * 600, None))
    reported: list[tuple[int, int, str]] = []
    with pytest.raises(ConfigError, match=r"benign: the prompts of rows \[2\] are longer.* 512"):
        contrast(
            degraded,
            family,
            safety=HARM,
            others=[long],
            progress=lambda *words: reported.append(words),
        )
    assert reported == [], "nothing is scored before all prompts are seen to fit"


# The best layers


def test_the_best_layers_are_in_order_and_the_lower_one_wins_a_draw() -> None:
    scores = [0.1, 0.9, 0.5, 0.5, -2.0, 0.5]
    assert top_layers(scores, 1, range(6)) == [1]
    assert top_layers(scores, 3, range(6)) == [1, 2, 3]
    assert top_layers(scores, 3, [5, 3, 4, 2]) == [2, 3, 5]
    assert top_layers(scores, 6, range(6)) == [0, 1, 2, 3, 4, 5]
    # Only layers that carry a vector can be chosen, however well others score.
    assert top_layers(scores, 2, [0, 4]) == [0, 4]


@pytest.mark.parametrize("k", [-1, 0, 3])
def test_k_is_one_to_the_number_of_layers_with_a_vector(k: int) -> None:
    with pytest.raises(ConfigError, match=f"top-k is {k}, expected 1 to 2"):
        top_layers([1.0, 2.0, 3.0], k, [0, 2])


def test_the_cut_family_retains_every_score_and_loads_again(
    model: Path, family: Family, tmp_path: Path
) -> None:
    found = Contrast((0.5, 0.25), (0.125, 0.5), 1.0, "update")
    save_family(select(family, found, 1, data=[HARM, GOOD]), tmp_path / "cut")
    cut = load_family(tmp_path / "cut")
    (retained,) = cut.header.layers
    assert (retained.layer, retained.score) == (0, 0.375)
    selection = cut.header.recipe["selection"]
    assert selection["scores"] == [0.375, -0.25]
    assert (selection["safety"], selection["others"]) == ([0.5, 0.25], [0.125, 0.5])
    assert (selection["k"], selection["mu"], selection["stream"]) == (1, 1.0, "update")
    assert selection["data"] == [HARM.record(), GOOD.record()]
    assert cut.header.recipe["method"] == "random"
    assert (cut.header.bounds, cut.header.name) == (family.header.bounds, family.header.name)
    assert cut.header.base == family.header.base and cut.digest != family.digest
    assert set(cut.lora_weights) == {site for site in family.lora_weights if layer_of(site) == 0}
    for site, lora in cut.lora_weights.items():
        assert torch.equal(lora.a, family.lora_weights[site].a)
        assert torch.equal(lora.b, family.lora_weights[site].b)


def test_layers_can_be_named_instead(family: Family) -> None:
    found = Contrast((0.5, 0.25), (0.125, 0.5), 1.0, "update")
    named = select(family, found, 99, layers=[1])
    assert [(entry.layer, entry.score) for entry in named.header.layers] == [(1, -0.25)]
    assert named.header.recipe["selection"]["k"] == 1
    with pytest.raises(SiteError, match="layer 0 has no weights"):
        select(named, found, 1, layers=[0])


def test_a_contrast_of_nothing_but_safety_ignores_the_others() -> None:
    found = Contrast((0.5, 0.25), (0.125, 0.5), 1.0, "update")
    assert replace(found, mu=0.0).scores == found.safety
