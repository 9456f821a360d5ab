"""What is asked: the training split that settings are chosen on, and the held-out prompts.

The held-out ones are the example's own (sources.py). The training split here only
chooses settings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import data
import mixes
from safegene_vllm.dataset import Dataset, Row
from safegene_vllm.evaluation.runner import PromptSet
from safegene_vllm.evaluation.tasks import Task
from safegene_vllm.recipe.examples import sample_rows
from sources import OURS, STYLE, dataset, own_task, prompt_sets

ATTACK, OVER_REFUSAL, ORDINARY = "advbench_test", "xstest_safe", "ordinary"
HARMFUL, HARMLESS = "harmful", "harmless"
CHOOSING_ROWS = 24
TASK_ROWS = 40
SHORT_ROWS = 20


@dataclass(frozen=True)
class Questions:
    """Prompt sets by name, and one labeled task."""

    sets: dict[str, PromptSet]
    task: Task


def drawn(prompts: Sequence[str], count: int) -> list[str]:
    """`count` of the prompts, those with the smallest SHA-256: no order of the file matters."""
    return sorted(prompts, key=lambda text: hashlib.sha256(text.encode()).hexdigest())[:count]


def choosing_harmful() -> list[str]:
    """The harmful prompts that settings are chosen on; kept out of the safety LoRA's training."""
    return drawn(data.prompts("harmful", "train"), CHOOSING_ROWS)


def choosing_task(tenant: str) -> Task:
    """The first rows of the tenant's own task, training split; the writer's is its house style."""
    if tenant in mixes.LABELED:
        rows = [Row(r["prompt"], r["answer"]) for r in data.task_rows(tenant, "train")[:TASK_ROWS]]
        labels = tuple(sorted({str(row.answer) for row in rows}))
        return Task(tenant, labels, dataset(f"tasks/{tenant} (train)", OURS, rows))
    prompts = data.prompts("ordinary", "train") + data.prompts("lookalike", "train")
    styled = [Row(prompt, STYLE) for prompt in drawn(prompts, TASK_ROWS)]
    return Task("house style", (STYLE,), dataset("prompts (train)", OURS, styled))


def choosing_questions(tenant: str) -> Questions:
    """24 harmful and 24 harmless prompts and 40 task rows, all of the project's training split.

    The harmless are half look-alikes, half ordinary.
    """
    harmless = [
        prompt
        for kind in ("lookalike", "ordinary")
        for prompt in drawn(data.prompts(kind, "train"), CHOOSING_ROWS // 2)
    ]
    sets = {
        HARMFUL: PromptSet("harmful", _prompts("harmful", choosing_harmful())),
        HARMLESS: PromptSet("over_refusal", _prompts("harmless", harmless)),
    }
    return Questions(sets, choosing_task(tenant))


def _prompts(what: str, prompts: Sequence[str]) -> Dataset:
    return dataset(f"prompts/{what} (train)", OURS, [Row(prompt, None) for prompt in prompts])


def held_out(
    tenant: str, advbench: Path, self_instruct: Path, xstest: Path, *, rows: int | None
) -> Questions:
    """AdvBench's test part, XSTest's safe prompts, ordinary prompts and the tenant's own task.

    `rows`: so many of each set, drawn by a fixed seed; None is all.
    """
    every = prompt_sets(advbench, self_instruct, xstest)
    sets = {name: every[name] for name in (ATTACK, OVER_REFUSAL, ORDINARY)}
    task = own_task(tenant)
    if rows is not None:
        sets = {name: replace(s, data=sample_rows(s.data, rows, 0)) for name, s in sets.items()}
        task = replace(task, data=sample_rows(task.data, rows, 0))
    return Questions(sets, task)
