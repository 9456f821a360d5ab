"""Selection of rows: concatenation with all licenses, balanced seeded samples, class check."""

from __future__ import annotations

from collections import Counter

import pytest
from recipe_setup import GOOD, HARM, dataset

from safegene_vllm.dataset import Dataset, Row, digest_of_rows
from safegene_vllm.errors import ConfigError
from safegene_vllm.recipe.examples import check_classes, concatenate, sample_rows


def labeled(**counts: int) -> Dataset:
    return dataset(
        *((f"{label} {n}", label) for label, count in counts.items() for n in range(count))
    )


def test_joined_data_preserve_order_names_and_licenses() -> None:
    other = dataset(("x", None), name="other", licence="CC BY 4.0")
    found = concatenate([HARM, other, GOOD])
    assert found.rows == (*HARM.rows, Row("x", None), *GOOD.rows)
    assert (found.name, found.source) == ("harm + other + good",) * 2
    assert found.licence == "MIT, CC BY 4.0"
    assert found.digest == digest_of_rows(found.rows)
    assert concatenate([HARM]) is HARM


def test_one_unknown_licence_makes_all_unknown() -> None:
    assert concatenate([HARM, dataset(("x", None), licence=None)]).licence is None


def test_as_many_as_there_are_is_all_of_them_in_order() -> None:
    assert sample_rows(HARM, 8, 0) is sample_rows(HARM, 99, 0) is HARM


@pytest.mark.parametrize("count", [1, 2, 3, 8, 9, 10, 11, 17, 22, 29])
@pytest.mark.parametrize("seed", range(3))
def test_a_draw_takes_each_answer_alike(count: int, seed: int) -> None:
    data = labeled(a=20, b=7, c=3)
    drawn = sample_rows(data, count, seed)
    assert len(drawn.rows) == count == len(set(drawn.rows)) and set(drawn.rows) <= set(data.rows)
    counts = Counter(row.answer for row in drawn.rows)
    # No answer has two more than another, unless the other is used up.
    for label, there in {"a": 20, "b": 7, "c": 3}.items():
        assert counts[label] == there or max(counts.values()) - counts[label] <= 1
    assert drawn.digest == digest_of_rows(drawn.rows)
    assert (drawn.name, drawn.licence, drawn.source) == (data.name, data.licence, data.source)


def test_a_draw_follows_from_the_seed() -> None:
    data = labeled(a=50, b=50)
    assert sample_rows(data, 8, 3) == sample_rows(data, 8, 3)
    assert len({sample_rows(data, 8, seed).digest for seed in range(5)}) == 5


def test_prompts_without_answers_are_drawn_as_one_kind() -> None:
    data = dataset(*((f"p{n}", None) for n in range(30)))
    assert len(sample_rows(data, 5, 0).rows) == 5
    # Free texts are all different: a draw is then a plain one.
    texts = dataset(*((f"p{n}", f"text {n}") for n in range(30)))
    assert len(set(sample_rows(texts, 5, 0).rows)) == 5


@pytest.mark.parametrize("count", [0, -3])
def test_zero_rows_are_rejected(count: int) -> None:
    with pytest.raises(ConfigError, match=f"harm: {count} rows requested, expected at least 1"):
        sample_rows(HARM, count, 0)


def test_a_task_of_one_class_is_rejected() -> None:
    with pytest.raises(
        ConfigError, match=r"all 4 task examples have the answer 'a'; give examples"
    ):
        check_classes(labeled(a=4))
    for fine in (
        labeled(a=3, b=1),
        labeled(a=1),
        dataset(("x", None), ("y", None)),
        dataset(("x", None), ("y", "a")),
    ):
        check_classes(fine)
