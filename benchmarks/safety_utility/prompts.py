"""Prompts of the benchmark: the training split that chooses settings, and held-out prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from examples.smollm2 import data, mixes
from examples.smollm2.datasets import OURS, STYLE, dataset, own_task, prompt_sets
from safegene_vllm.dataset import Dataset, Row
from safegene_vllm.evaluation.runner import PromptSet
from safegene_vllm.evaluation.tasks import Task
from safegene_vllm.recipe.examples import sample_rows

ATTACK, OVER_REFUSAL, ORDINARY = "advbench_test", "xstest_safe", "ordinary"
HARMFUL, HARMLESS = "harmful", "harmless"
CHOOSING_ROWS = 24
TASK_ROWS = 40
SHORT_ROWS = 20


@dataclass(frozen=True)
class EvaluationPrompts:
    """Prompt sets by name, and one labeled task."""

    sets: dict[str, PromptSet]
    task: Task


def drawn(prompts: Sequence[str], count: int) -> list[str]:
    """`count` prompts with the smallest SHA-256, independent of the file's order."""
    return sorted(prompts, key=lambda text: hashlib.sha256(text.encode()).hexdigest())[:count]


def choosing_harmful() -> list[str]:
    """Harmful prompts that settings are chosen on, excluded from the safety LoRA's training."""
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


def choosing_prompts(tenant: str) -> EvaluationPrompts:
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
    return EvaluationPrompts(sets, choosing_task(tenant))


def _prompts(what: str, prompts: Sequence[str]) -> Dataset:
    return dataset(f"prompts/{what} (train)", OURS, [Row(prompt, None) for prompt in prompts])


def held_out(
    tenant: str, advbench: Path, self_instruct: Path, xstest: Path, *, rows: int | None
) -> EvaluationPrompts:
    """AdvBench's test part, XSTest's safe prompts, ordinary prompts and the tenant's own task.

    `rows` limits each set, drawn by a fixed seed.
    """
    every = prompt_sets(advbench, self_instruct, xstest)
    sets = {name: every[name] for name in (ATTACK, OVER_REFUSAL, ORDINARY)}
    task = own_task(tenant)
    if rows is not None:
        sets = {name: replace(s, data=sample_rows(s.data, rows, 0)) for name, s in sets.items()}
        task = replace(task, data=sample_rows(task.data, rows, 0))
    return EvaluationPrompts(sets, task)
