"""Selection of rows: several data sets concatenated, and a seeded sample.

Samples are balanced over the answers, so that a few-shot set has every class.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from safegene_vllm.dataset import Dataset, Row, digest_of_rows
from safegene_vllm.errors import ConfigError
from safegene_vllm.prompt_sketch import part_of


def concatenate(parts: Sequence[Dataset]) -> Dataset:
    """Concatenate the rows, names and licenses of several data sets."""
    if len(parts) == 1:
        return parts[0]
    rows = tuple(row for part in parts for row in part.rows)
    licences = list(dict.fromkeys(part.licence for part in parts if part.licence))
    return Dataset(
        " + ".join(part.name for part in parts),
        rows,
        ", ".join(licences) if all(part.licence for part in parts) else None,
        digest_of_rows(rows),
        " + ".join(part.source for part in parts),
    )


def sample_rows(data: Dataset, count: int, seed: int) -> Dataset:
    """Draw `count` rows by `seed`, balanced over the answers; all rows if there are fewer.

    Errors: ConfigError if `count` is not positive.
    """
    if count < 1:
        raise ConfigError(f"{data.name}: {count} rows requested, expected at least 1")
    if count >= len(data.rows):
        return data
    by_answer: dict[str | None, list[Row]] = defaultdict(list)
    rng = random.Random(f"{seed}-{data.digest}")
    for row in rng.sample(data.rows, len(data.rows)):
        by_answer[row.answer].append(row)
    groups = list(by_answer.values())
    rows: list[Row] = []
    while len(rows) < count:
        rows += [group.pop() for group in groups if group][: count - len(rows)]
    return Dataset(data.name, tuple(rows), data.licence, digest_of_rows(rows), data.source)


def split_by_prompt(data: Dataset) -> tuple[Dataset, Dataset]:
    """(train, held out) rows by the digest of the prompt: the same split in every command."""
    parts = [
        tuple(row for row in data.rows if part_of(row.prompt) == part)
        for part in ("train", "held-out")
    ]
    train, held_out = (replace(data, rows=rows, digest=digest_of_rows(rows)) for rows in parts)
    return train, held_out


def check_classes(task: Dataset) -> None:
    """Check that the task examples have different answers. Errors: ConfigError."""
    answers = {row.answer for row in task.rows}
    if len(answers) == 1 and None not in answers and len(task.rows) > 1:
        raise ConfigError(
            f"{task.name}: all {len(task.rows)} task examples have the answer "
            f"{next(iter(answers))!r}; give examples of every class, so that a loss of task "
            "accuracy can be measured"
        )
