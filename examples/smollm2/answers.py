"""Answers kept as JSONL: the base model's own, which later stages train on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from safegene_vllm.recipe.generation import Completion


def save_answers(path: Path, answers: Sequence[Completion]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_suffix(".tmp")
    temp.write_text("".join(json.dumps(asdict(answer)) + "\n" for answer in answers))
    temp.replace(path)


def read_answers(path: Path) -> list[Completion]:
    return [Completion(**json.loads(line)) for line in path.read_text().splitlines()]
