"""Prompts as tokens, stop tokens, prompts that do not fit, greedy decoding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from recipe_setup import SPECIAL, TEMPLATE, tiny_chat_model, write_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from safegene_vllm.chat import (
    chat_text,
    check_lengths,
    check_template,
    completion_text,
    context_tokens,
    end_of_turn,
    greedy_tokens,
    load_tokenizer,
    model_stop_tokens,
    prompt_tokens,
    resolve_device,
    stop_tokens,
    truncate_at_stop,
)
from safegene_vllm.errors import ConfigError

START = SPECIAL.index("<s>")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_model(tmp_path_factory.mktemp("chat") / "model")


def test_a_prompt_is_one_turn_of_the_template(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    (ids,) = prompt_tokens(tokenizer, ["hi <s>"])
    assert tokenizer.decode(ids) == "<s>u:hi <s><s>a:" and "add_generation_prompt" in TEMPLATE
    assert completion_text(tokenizer, [*tokenizer.encode(" yes "), 2]) == "yes"


def test_a_prompt_ends_where_the_assistants_turn_begins(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    assert chat_text(tokenizer, "hi") == "<s>u:hi<s>a:"
    (ids,) = prompt_tokens(tokenizer, ["hi"])
    assert ids[0] == START
    assert tokenizer.decode(ids) == "<s>u:hi<s>a:"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (TEMPLATE, "<end>"),
        (TEMPLATE.replace("'<end>'", "'<end>\\n'"), "<end>"),
        (TEMPLATE.replace("'<end>'", "'.</s>'"), ".</s>"),
        # Rewrites the completion, as a template that adds an empty thought does: no known end.
        (TEMPLATE.replace("+ m['content']", "+ 'thought ' + m['content']"), "<end>"),
        (TEMPLATE.replace("'<end>'", "''"), "<end>"),
    ],
)
def test_the_end_of_a_turn_is_the_templates_or_the_tokenizers(
    model: Path, template: str, text: str
) -> None:
    tokenizer: Any = load_tokenizer(model)
    tokenizer.chat_template = template
    assert tokenizer.decode(end_of_turn(tokenizer)) == text


def test_no_tokenizer_and_no_template(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer can be read"):
        load_tokenizer(tmp_path)
    write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    check_template(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=r"no chat template.*set chat_template") as rejected:
        check_template(tokenizer)
    assert str(rejected.value).startswith(f"{tmp_path}: ")


def test_an_unknown_device() -> None:
    assert resolve_device("cpu").type == "cpu"
    with pytest.raises(ConfigError, match="device 'abacus' cannot be used"):
        resolve_device("abacus")


def test_stop_tokens_are_read_from_every_source(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": 7}}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 2]}))
    assert stop_tokens(tmp_path, load_tokenizer(tmp_path)) == [2, 5, 7]
    assert truncate_at_stop([9, 5, 9], [2, 5]) == [9] and truncate_at_stop([9], []) == [9]


def test_stop_tokens_of_a_model_in_memory(model: Path) -> None:
    net, tokenizer = AutoModelForCausalLM.from_pretrained(model), load_tokenizer(model)
    for known, stops in ((None, [2]), (5, [2, 5]), ([9, 7], [2, 7, 9])):
        net.generation_config.eos_token_id = known
        assert model_stop_tokens(net, tokenizer) == stops
    greedy_tokens(net, tokenizer, [[3]], 1, stops)
    assert model_stop_tokens(net, tokenizer) == [2, 7, 9], "decoding forgets none"


def test_the_context(tmp_path: Path) -> None:
    for config, expected in (
        ({"max_position_embeddings": 512}, 512),
        ({"text_config": {"max_position_embeddings": 64}}, 64),
        ({}, None),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert context_tokens(tmp_path) == expected


def test_prompts_that_do_not_fit_are_reported_together(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    prompts = {"--harmful a": ["x" * 10, "x" * 90, "x"], "--task b": ["x" * 50, "x" * 95]}
    max_tokens = {"--harmful a": 30, "--task b": 2}
    overhead = len(prompt_tokens(tokenizer, [""])[0])
    assert check_lengths(tokenizer, prompts, max_tokens, 200) == 90 + 30 + overhead
    assert check_lengths(tokenizer, prompts, max_tokens, None) == 90 + 30 + overhead
    with pytest.raises(ConfigError) as caught:
        check_lengths(tokenizer, prompts, max_tokens, 100)
    message = str(caught.value)
    assert "--harmful a: 1 prompts plus 30 generated tokens exceed" in message
    assert f"rows 2 ({120 + overhead} tokens)" in message and "--task b: 1 prompts" in message


def test_greedy_is_the_plain_argmax_whatever_the_generation_config(model: Path) -> None:
    net = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = load_tokenizer(model)
    rows = prompt_tokens(tokenizer, ["one", "a longer one"])
    alone = [greedy_tokens(net, tokenizer, [row], 12, [2])[0] for row in rows]
    net.generation_config.repetition_penalty = 50.0
    net.generation_config.suppress_tokens = [alone[0][0]]
    assert greedy_tokens(net, tokenizer, rows, 12, [2]) == alone
    stopped = greedy_tokens(net, tokenizer, rows, 12, [alone[0][3]])[0]
    assert stopped == alone[0][: alone[0].index(alone[0][3])]
