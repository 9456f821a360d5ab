"""Validation and split of a calibration's examples."""

from __future__ import annotations

from typing import Any

import pytest
from calibration_setup import examples

from safegene_server.calibration.examples import read_examples, record_of, split
from safegene_server.tenants import CalibrationSettings
from safegene_vllm.dataset import Row, digest_of_rows
from safegene_vllm.errors import ConfigError

SETTINGS = CalibrationSettings(max_shots=8)
ONE = {"prompt": "p", "answer": "a"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "safety: 0 examples, expected 2 to 8.*task: 0 examples"),
        (examples(safety=[]), "safety: 0 examples"),
        (examples(task=None), "task: 0 examples"),
        (examples(task=[ONE]), "task: 1 examples"),
        (examples(benign=[ONE]), "benign: 1 examples"),
        (examples(safety=[ONE] * 9), "safety: 9 examples"),
        (examples(task=[ONE, ONE]), "task: all 2 examples have the same answer"),
        (examples(safety=[ONE, {"prompt": " "}]), "safety: example 2 has an empty prompt"),
        (examples(safety=[ONE, {"prompt": "p", "answer": ""}]), "empty prompt or answer"),
    ],
)
def test_unusable_examples_are_rejected(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_examples(given, SETTINGS)


def test_good_ones_are_split_by_the_seed_with_some_of_each_kind_held_out() -> None:
    examples_read = read_examples(examples(benign=[{"prompt": "b"}, {"prompt": "c"}]), SETTINGS)
    assert list(examples_read) == ["safety", "task", "benign"]
    assert examples_read["benign"] == (Row("b", None), Row("c", None))
    searched, held = split(examples_read, 0.25, 0)
    for kind, rows in examples_read.items():
        assert searched[kind] and held[kind]
        assert sorted([*searched[kind], *held[kind]], key=str) == sorted(rows, key=str)
    assert split(examples_read, 0.25, 0) == (searched, held)
    assert any(split(examples_read, 0.25, seed) != (searched, held) for seed in range(1, 5))


def test_the_record_holds_digests_and_no_text() -> None:
    examples_read = read_examples(examples(), SETTINGS)
    record = record_of(examples_read, split(examples_read, 0.5, 0)[1])
    digest = digest_of_rows(examples_read["task"]).removeprefix("sha256:")
    assert record["task"] == {"rows": 4, "held_out": 2, "sha256": digest}
    assert all(f"{word} 1" not in str(record) for word in ("label", "bad", "task"))
