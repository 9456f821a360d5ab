"""Normalization, split and sketches of prompts."""

from __future__ import annotations

import base64
import json

import pytest

from safegene_vllm.prompt_sketch import (
    MAX_RECORDED,
    minhash,
    normalized,
    part_of,
    read_sketches,
    similarity,
    sketch,
    without_sketches,
)

LONG = "write a short tutorial for beginners on how to grow tomatoes on a small and windy balcony"


def record(prompts: list[str]) -> dict[str, object]:
    return {"name": "x", "prompts": sketch(prompts)}


@pytest.mark.parametrize(
    ("one", "other"),
    [("How  to\tDo it?", "how to do it"), ("ﬁne — “so”!", "FINE so"), ("¿?", " ¿? ")],
)
def test_case_spaces_and_punctuation_do_not_count(one: str, other: str) -> None:
    assert normalized(one) == normalized(other) != ""
    assert part_of(one) == part_of(other)


def test_a_fifth_is_held_out() -> None:
    parts = [part_of(f"prompt {n}") for n in range(2000)]
    assert 0.17 < parts.count("held-out") / len(parts) < 0.23


def test_split_and_signatures_are_the_same_in_every_release() -> None:
    assert [n for n in range(30) if part_of(f"prompt {n}") == "held-out"] == [
        *(0, 3, 4, 6, 11, 15, 24, 25, 29)
    ]
    assert f"{minhash('a b c'):064x}" == (
        "6f25cf91fe254a294876800504e5ef3ad7e7e06e73a040c57089b85dde2a79a6"
    )


@pytest.mark.parametrize(
    ("other", "jaccard"),
    [
        (LONG, 1.0),
        (LONG.replace("balcony", "roof"), 14 / 16),
        (LONG.replace("tutorial", "guide"), 12 / 18),
        ("what is the capital of the country that lies to the north of spain", 0.0),
    ],
)
def test_similarity_estimates_the_jaccard_index_of_word_trigrams(
    other: str, jaccard: float
) -> None:
    assert similarity(minhash(LONG), minhash(other)) == pytest.approx(jaccard, abs=0.15)


def test_a_record_has_digests_and_no_text() -> None:
    found = record([LONG, LONG.upper(), "another prompt of some words"])
    assert "tomatoes" not in json.dumps(found)
    used = read_sketches([found])
    assert used is not None and used.complete and len(used.signatures) == 2
    assert used.matches(LONG.title() + "!") == "exact"
    assert used.matches(LONG.replace("balcony", "roof")) == "near"
    assert used.matches("an unrelated prompt of some words") == ""


def test_a_record_is_bounded_and_says_so() -> None:
    prompts = [f"prompt number {n} of many" for n in range(MAX_RECORDED + 100)]
    found = record(prompts)
    assert len(json.dumps(found)) < 30_000
    used = read_sketches([found])
    assert used is not None and not used.complete and len(used.signatures) == MAX_RECORDED
    assert sum(used.matches(prompt) == "exact" for prompt in prompts) == MAX_RECORDED


@pytest.mark.parametrize(
    "prompts",
    [
        None,
        {"form": "other"},
        {**sketch(["a"]), "data": 7},
        {**sketch(["a"]), "data": "###"},
        {**sketch(["a"]), "data": base64.b64encode(b"123").decode()},
        {**sketch(["a"]), "data": base64.b64encode(bytes(40 * (MAX_RECORDED + 1))).decode()},
    ],
)
def test_what_is_no_sketch_counts_as_not_recorded(prompts: object) -> None:
    assert read_sketches([record(["b"]), {"name": "x", "prompts": prompts}]) is None
    assert read_sketches([{"name": "x"}]) is None and read_sketches([7]) is None


def test_records_are_shown_without_sketches() -> None:
    shown = without_sketches({"data": [record(["a", "b"])], "n": 1})
    assert shown == {
        "data": [{"name": "x", "prompts": "2 of 2 recorded as digests"}],
        "n": 1,
    }
