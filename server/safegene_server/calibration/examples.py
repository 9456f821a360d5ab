"""Examples of a calibration: checked, and split into searched and held-out ones."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from safegene_server.tenants.settings import CalibrationSettings
from safegene_vllm.dataset import Row, digest_of_rows
from safegene_vllm.errors import ConfigError

KINDS = ("safety", "task", "benign")
Examples = Mapping[str, tuple[Row, ...]]
"""Rows by kind. `benign` may be missing; answers that are None are generated."""


def read_examples(raw: Mapping[str, Any], settings: CalibrationSettings) -> Examples:
    """`{"safety": [{"prompt", "answer"}], "task": [...], "benign": [...]}`, checked.

    Errors: ConfigError naming every kind that is missing, too small, too large or of one class.
    """
    examples = {
        kind: tuple(Row(row["prompt"], row.get("answer")) for row in raw.get(kind) or ())
        for kind in KINDS
    }
    if not examples["benign"]:
        del examples["benign"]
    errors = []
    for kind, rows in examples.items():
        if not 2 <= len(rows) <= settings.max_shots:
            errors.append(
                f"{kind}: {len(rows)} examples, expected 2 to {settings.max_shots}; some of them "
                "are held out"
            )
        blank = [
            str(number)
            for number, row in enumerate(rows, 1)
            if not row.prompt.strip() or (row.answer is not None and not row.answer.strip())
        ]
        if blank:
            errors.append(
                f"{kind}: example {', '.join(blank[:5])} has an empty prompt or answer; give the "
                "text, or null as the answer"
            )
    answers = {row.answer for row in examples["task"]}
    if len(answers) == 1 and None not in answers and len(examples["task"]) > 1:
        errors.append(
            f"task: all {len(examples['task'])} examples have the same answer; give examples of "
            "every class, so that a loss of the task can be seen"
        )
    if errors:
        raise ConfigError("; ".join(errors) + ".")
    return examples


def split(examples: Examples, share: float, seed: int) -> tuple[Examples, Examples]:
    """(searched on, held out), at least one example of every kind in each."""
    searched, held = {}, {}
    for kind, rows in examples.items():
        order = random.Random(f"{seed}-{kind}").sample(range(len(rows)), len(rows))
        count = min(len(rows) - 1, max(1, round(len(rows) * share)))
        held[kind] = tuple(rows[i] for i in order[:count])
        searched[kind] = tuple(rows[i] for i in order[count:])
    return searched, held


def record_of(examples: Examples, held: Examples) -> dict[str, Any]:
    """Counts and digests of the examples for a calibration's record, without their text."""
    return {
        kind: {
            "rows": len(rows),
            "held_out": len(held[kind]),
            "sha256": digest_of_rows(rows).removeprefix("sha256:"),
        }
        for kind, rows in examples.items()
    }


def weights_of(settings: CalibrationSettings, kinds: Sequence[str]) -> dict[str, float]:
    every = {"safety": 1.0, "task": settings.task, "benign": settings.benign}
    return {kind: every[kind] for kind in kinds}
