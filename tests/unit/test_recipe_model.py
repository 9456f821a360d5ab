"""Layers, states and head of a model, rejection of scaled logits, and greedy completions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from recipe_setup import tiny_chat_model, write_tokenizer
from transformers import AutoModelForCausalLM, GraniteConfig

from safegene_vllm.chat import chat_text
from safegene_vllm.errors import ConfigError, SiteError
from safegene_vllm.recipe.encoding import Example, collate, encode
from safegene_vllm.recipe.generation import generate_greedy
from safegene_vllm.recipe.model import (
    LoadedModel,
    check_head,
    completion_states,
    head_of,
    last_prompt_states,
    layer_modules,
    load_model,
    record_layers,
)
from safegene_vllm.tiny_model import CONFIGS, SHAPE, make_model, write_tenant

PROMPTS = ["a", "a much longer prompt than the others", "bb", "c?"]


@pytest.fixture(scope="module", params=CONFIGS)
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    path = tiny_chat_model(tmp_path_factory.mktemp("models") / request.param, request.param)
    return load_model(path, dtype=torch.float32)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_model(tmp_path_factory.mktemp("llama"))


def test_the_head_over_the_completions_states_is_the_models_logits(each: LoadedModel) -> None:
    check_head(each)
    rows = encode(
        each.tokenizer, [Example(p, p[::-1]) for p in PROMPTS], max_answer_tokens=9,
        context_tokens=each.context_tokens,
    )  # fmt: skip
    batch = collate(rows, each.pad)
    found = iter(head_of(each.model)(completion_states(each.model, batch)))
    for row in rows:
        alone = each.model(torch.tensor([row.ids])).logits[0].float()
        for t in range(row.prompt_tokens - 1, len(row.ids) - 1):
            torch.testing.assert_close(next(found), alone[t], atol=1e-4, rtol=1e-4)
    assert next(found, None) is None


def test_layers_are_found_in_order(each: LoadedModel) -> None:
    layers = layer_modules(each.model)
    assert layers == list(each.model.model.layers)


def test_modules_numbered_inside_a_layer_are_no_layers() -> None:
    def block() -> torch.nn.Module:
        experts = torch.nn.ModuleList([torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)])
        return torch.nn.ModuleDict({"experts": experts})

    def stack(*layers: torch.nn.Module) -> torch.nn.Module:
        return torch.nn.ModuleDict({"layers": torch.nn.ModuleList(layers)})

    blocks = [block(), block()]
    assert layer_modules(stack(*blocks)) == blocks
    two = torch.nn.ModuleDict({"text": stack(*blocks), "vision": stack(block())})
    with pytest.raises(ConfigError, match="more than one layer 0"):
        layer_modules(two)
    with pytest.raises(ConfigError, match="no list of layers"):
        layer_modules(torch.nn.ModuleDict({"stages": torch.nn.ModuleList(blocks)}))


def test_a_model_that_scales_its_logits_is_rejected(tmp_path: Path) -> None:
    shape = {key: value for key, value in SHAPE.items() if key != "head_dim"}
    model = AutoModelForCausalLM.from_config(GraniteConfig(**shape, logits_scaling=4.0))
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="GraniteForCausalLM: its logits are not its output head"):
        check_head(load_model(tmp_path))


def test_the_stream_that_is_recorded_is_the_models_own(each: LoadedModel) -> None:
    ids = torch.arange(3, 19).reshape(2, 8)
    last = torch.tensor([3, 7])
    with record_layers(each.model) as layers:
        out = each.model(ids, output_hidden_states=True)
    found = last_prompt_states(layers, last)
    assert found.shape == (2, 2, 128)
    # Transformers normalizes its last one; the first layer's is as it is.
    torch.testing.assert_close(found[0, 0], out.hidden_states[1][0, 3])
    torch.testing.assert_close(found[1, 0], out.hidden_states[1][1, 7])
    final = each.model.model.norm(found[:, 1])
    torch.testing.assert_close(final[0], out.hidden_states[-1][0, 3])
    assert len(layers) == 2
    each.model(ids)
    assert len(layers) == 2
    with record_layers(each.model, enabled=False) as nothing:
        each.model(ids)
    assert nothing == []


# Loading


def test_a_model_is_loaded_frozen_with_its_adapter_merged(llama: Path, tmp_path: Path) -> None:
    write_tenant(llama, tmp_path / "a", None, None)
    plain, merged = load_model(llama), load_model(llama, tmp_path / "a")
    ids = torch.arange(3, 11)[None]
    assert not torch.equal(plain.model(ids).logits, merged.model(ids).logits)
    assert plain.model.dtype == torch.bfloat16 and not plain.model.training
    assert not any(weight.requires_grad for weight in merged.model.parameters())
    assert (plain.context_tokens, plain.pad) == (512, 0)


def test_an_adapter_of_another_architecture_is_rejected(llama: Path, tmp_path: Path) -> None:
    phi = make_model("phi3", tmp_path / "phi")
    write_tenant(phi, tmp_path / "a", None, None)
    with pytest.raises(SiteError, match=r"another architecture"):
        load_model(llama, tmp_path / "a")


def test_a_checkpoint_without_a_tokenizer_and_a_device_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer can be read"):
        load_model(make_model("llama", tmp_path / "bare"))
    with pytest.raises(ConfigError, match="device 'abacus' cannot be used"):
        load_model(tiny_chat_model(tmp_path / "chat"), device="abacus")


def test_padding_falls_back_to_what_there_is(llama: Path) -> None:
    loaded = load_model(llama)
    loaded.tokenizer.pad_token = None
    assert loaded.pad == loaded.tokenizer.eos_token_id == 2
    loaded.tokenizer.eos_token = None
    assert loaded.pad == 0


# Greedy completions


@pytest.mark.parametrize("batch", [1, 3, 32])
def test_completions_are_in_order_and_batches_do_not_matter(each: LoadedModel, batch: int) -> None:
    reported: list[tuple[int, int]] = []

    def progress(done: int, total: int, words: str) -> None:
        reported.append((done, total))

    found = generate_greedy(each, PROMPTS, 6, batch=batch, progress=progress)
    assert [completion.prompt for completion in found] == PROMPTS and reported[-1] == (4, 4)
    for completion in found:
        text = chat_text(each.tokenizer, completion.prompt)
        ids = each.tokenizer.encode(text, add_special_tokens=False)
        start = len(ids)
        ended = False
        while len(ids) < start + 6 and not ended:
            token = int(each.model(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)
            ended = token == each.tokenizer.eos_token_id
        decoded = each.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
        assert (completion.text, completion.finished) == (decoded, ended)


def test_a_completion_knows_whether_it_was_ended(llama: Path) -> None:
    loaded = load_model(llama, dtype=torch.float32)
    head = loaded.model.get_output_embeddings()
    # Every completion ends at once: the end has the largest logit, whatever the state.
    head.bias = torch.nn.Parameter(torch.zeros(320))
    head.bias.data[loaded.tokenizer.eos_token_id] = 1e4
    (completion,) = generate_greedy(loaded, ["hello"], 6)
    assert (completion.text, completion.finished) == ("", True)
    head.bias.data[loaded.tokenizer.eos_token_id] = -1e4
    (completion,) = generate_greedy(loaded, ["hello"], 6)
    assert not completion.finished
    assert generate_greedy(loaded, [], 6) == []


def test_a_tokenizer_without_a_template_is_rejected(llama: Path) -> None:
    loaded = load_model(llama)
    loaded.tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="chat template"):
        generate_greedy(loaded, PROMPTS, 4)
