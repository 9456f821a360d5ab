"""Examples as tokens: completions marked exactly, batches by seed and step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recipe_setup import SPECIAL, TEMPLATE, write_tokenizer

from safegene_vllm.chat import load_tokenizer, prompt_tokens
from safegene_vllm.errors import ConfigError
from safegene_vllm.recipe.encoding import (
    Batches,
    Encoded,
    Example,
    batches_by_length,
    collate,
    encode,
)

PAD, START, END = range(len(SPECIAL))
law = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return directory


@pytest.fixture
def tokenizer(saved: Path) -> Any:
    return load_tokenizer(saved)


def encoded(tokenizer: Any, *examples: Example, max_tokens: int = 64, context: int = 512) -> Any:
    return encode(tokenizer, examples, max_answer_tokens=max_tokens, context_tokens=context)


# One example


def test_the_completion_begins_where_the_prompt_ends_and_is_ended(tokenizer: Any) -> None:
    (row,) = encoded(tokenizer, Example("hi", "no, sorry"))
    assert tokenizer.decode(row.ids[: row.prompt_tokens]) == "<s>u:hi<s>a:"
    assert tokenizer.decode(row.ids[row.prompt_tokens :]) == "no, sorry<end>"
    assert row.ids[-1] == END


def test_a_truncated_completion_is_not_ended(tokenizer: Any) -> None:
    cut, long, exact = encoded(
        tokenizer, Example("p", "abc", whole=False), Example("p", "abcdef"), Example("p", "abc"),
        max_tokens=4,
    )  # fmt: skip
    decoded = [tokenizer.decode(row.ids[row.prompt_tokens :]) for row in (cut, long, exact)]
    assert decoded == ["abc", "abcd", "abc<end>"]


def test_a_tokenizer_that_cannot_chat_is_rejected(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE.replace("'<end>'", "''")
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="set eos_token"):
        encoded(tokenizer, Example("p", "a"))
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="set chat_template"):
        encoded(tokenizer, Example("p", "a"))


def test_rows_that_do_not_fit_the_context_are_named(tokenizer: Any) -> None:
    context = len(prompt_tokens(tokenizer, ["x" * 10])[0]) + len("ab") + 1
    fits = Example("x" * 10, "ab")
    assert len(encoded(tokenizer, fits, context=context)) == 1
    long = Example("x" * 11, "ab")
    with pytest.raises(ConfigError) as rejected:
        encode(
            tokenizer, [fits, long, fits, long],
            max_answer_tokens=64, context_tokens=context, what="benign data",
        )  # fmt: skip
    reported = str(rejected.value)
    assert (
        reported.startswith("benign data: 2 examples")
        and f"context of {context} tokens" in reported
    )
    assert (
        "row 2 (" in reported
        and "row 4 (" in reported
        and "row 1" not in reported
        and "row 3" not in reported
    )


def test_no_examples_at_all_are_rejected(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="is empty"):
        encoded(tokenizer)


# A batch

rows_of_any_length = st.lists(
    st.tuples(st.integers(1, 7), st.integers(1, 6)).map(
        lambda n: Encoded(tuple(range(3, 3 + sum(n))), n[0])
    ),
    min_size=1,
    max_size=6,
)


@law
@given(rows_of_any_length)
def test_a_batch_marks_what_a_loop_marks(rows: list[Encoded]) -> None:
    batch = collate(rows, PAD)
    width = max(len(row.ids) for row in rows)
    targets, shares = [], []
    assert batch.ids.shape == batch.mask.shape == batch.wanted.shape == (len(rows), width)
    for i, row in enumerate(rows):
        completion = row.ids[row.prompt_tokens :]
        for t in range(width):
            there = t < len(row.ids)
            assert batch.ids[i, t] == (row.ids[t] if there else PAD)
            assert batch.mask[i, t] == int(there)
            predicts_completion = row.prompt_tokens <= t + 1 < len(row.ids)
            assert bool(batch.wanted[i, t]) is predicts_completion
            if predicts_completion:
                targets.append(row.ids[t + 1])
                shares.append(1 / len(completion))
        assert batch.last_prompt[i] == row.prompt_tokens - 1
    # Boolean indexing is row by row, and so must be the targets.
    assert batch.targets.tolist() == targets
    assert batch.share.tolist() == pytest.approx(shares)
    assert batch.share.sum().item() == pytest.approx(len(rows))


def test_a_batch_moves_as_a_whole() -> None:
    batch = collate([Encoded((3, 4, 5), 2)], PAD).to("meta")
    for name in ("ids", "mask", "wanted", "targets", "share", "last_prompt"):
        assert getattr(batch, name).device == torch.device("meta")


# Batches by step

lengths_of_rows = st.lists(st.integers(1, 30), min_size=1, max_size=90)


@law
@given(lengths_of_rows, st.integers(1, 9), st.integers(0, 5), st.randoms(use_true_random=False))
def test_a_batch_follows_from_seed_and_step_alone(
    lengths: list[int], size: int, seed: int, order: Any
) -> None:
    straight = Batches(lengths, size, seed)
    steps = range(3 * straight.per_epoch)
    wanted = [straight.at(step) for step in steps]
    jumping = Batches(lengths, size, seed)
    for step in order.sample(steps, len(steps)):
        assert jumping.at(step) == wanted[step]


@law
@given(lengths_of_rows, st.integers(1, 9), st.integers(0, 5))
def test_every_row_is_used_once_an_epoch(lengths: list[int], size: int, seed: int) -> None:
    batches = Batches(lengths, size, seed)
    for epoch in range(2):
        chosen = [
            batches.at(epoch * batches.per_epoch + place) for place in range(batches.per_epoch)
        ]
        assert all(1 <= len(rows) <= size for rows in chosen)
        assert sorted(i for rows in chosen for i in rows) == list(range(len(lengths)))


def test_seeds_and_epochs_shuffle_differently() -> None:
    batches = Batches([1] * 40, 4, 0)
    first = [batches.at(step) for step in range(10)]
    assert first != [batches.at(step) for step in range(10, 20)]
    assert first != [Batches([1] * 40, 4, 1).at(step) for step in range(10)]


def test_similar_lengths_share_a_batch() -> None:
    lengths = [1, 100] * 16
    batches = Batches(lengths, 4, 0)
    for step in range(batches.per_epoch):
        assert len({lengths[i] for i in batches.at(step)}) == 1


@law
@given(lengths_of_rows, st.integers(1, 9))
def test_in_order_takes_every_row_once_the_short_ones_first(lengths: list[int], size: int) -> None:
    chosen = [i for rows in batches_by_length(lengths, size) for i in rows]
    assert sorted(chosen) == list(range(len(lengths)))
    assert [lengths[i] for i in chosen] == sorted(lengths)
    assert all(len(rows) <= size for rows in batches_by_length(lengths, size))
