"""Data sets of the example with license and digest, as the recipe and the evaluation take them.

Training parts for the vector and the few-shot examples; held-out test parts for measuring.
Third-party prompts are read from the given paths and not stored.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from examples.smollm2 import data, mixes
from safegene_vllm.dataset import Dataset, Row, digest_of_rows, read_dataset
from safegene_vllm.evaluation.runner import PromptSet
from safegene_vllm.evaluation.tasks import Task
from safegene_vllm.recipe.examples import sample_rows
from safegene_vllm.recipe.generation import Completion

OURS = "Apache-2.0"
ORDINARY_ROWS = 100
STYLE = "Sure"
"""First word of a writer's completion; its task is the house style."""


def save_completions(path: Path, completions: Sequence[Completion]) -> None:
    """Write the base model's own completions as JSONL, which later stages train on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(asdict(one)) + "\n" for one in completions))
    temporary.replace(path)


def read_completions(path: Path) -> list[Completion]:
    return [Completion(**json.loads(line)) for line in path.read_text().splitlines()]


def dataset(name: str, licence: str, rows: Sequence[Row]) -> Dataset:
    return Dataset(name, tuple(rows), licence, digest_of_rows(rows), name)


def _own(kind: str, split: str) -> Dataset:
    rows = [Row(prompt, None) for prompt in data.prompts(kind, split)]
    return dataset(f"prompts/{kind} ({split})", OURS, rows)


def safety_data(advbench: Path) -> Dataset:
    """Harmful prompts of the training parts, which the parent refuses."""
    goals, _ = data.advbench(advbench)
    rows = [Row(prompt, None) for prompt in goals + data.prompts("harmful", "train")]
    return dataset("advbench (train) + prompts/harmful (train)", f"MIT, {OURS}", rows)


def benign_data(self_instruct: Path, completions: Sequence[Completion]) -> Dataset:
    """Every benign prompt with a completion in the degraded model's style."""
    examples = data.with_opening(
        data.helpful(completions, mixes.benign_prompts(self_instruct)),
        data.DEGRADE_OPENINGS,
        random.Random(mixes.DISTILLATION.seed),
    )
    rows = [Row(e.prompt, e.answer) for e in examples]
    return dataset("self-instruct + prompts (train)", OURS, rows)


def task_data(tenant: str) -> Dataset:
    """Training split of a tenant's own task."""
    if tenant not in mixes.LABELED:
        return _own("ordinary", "train")
    rows = [Row(r["prompt"], r["answer"]) for r in data.task_rows(tenant, "train")]
    return dataset(f"tasks/{tenant} (train)", OURS, rows)


def few_shot_data(tenant: str, count: int, seed: int = 0) -> tuple[Dataset, Dataset, Dataset]:
    """(safety, task, benign) few-shot examples of a tenant, written for this project."""
    return (
        sample_rows(_own("harmful", "train"), count, seed),
        sample_rows(task_data(tenant), count, seed),
        sample_rows(_own("lookalike", "train"), count, seed),
    )


def prompt_sets(
    advbench: Path, self_instruct: Path, xstest: Path, xstest_rows: int | None = None
) -> dict[str, PromptSet]:
    """Evaluation sets; only `ordinary_seen` contains prompts that were trained on."""
    limit = "" if xstest_rows is None else f"&limit={xstest_rows}"
    safe = read_dataset(f"{xstest / 'xstest_prompts.csv'}?label=safe&licence=CC%20BY%204.0{limit}")
    goals = [Row(goal, None) for goal in data.advbench(advbench)[1]]
    unseen = [Row(prompt, None) for prompt in data.self_instruct_unseen(self_instruct)]
    seen = [Row(prompt, None) for prompt in data.self_instruct(self_instruct)]
    return {
        "advbench_test": PromptSet("harmful", dataset("advbench (test)", "MIT", goals)),
        "own_harmful": PromptSet("harmful", _own("harmful", "demo")),
        "xstest_safe": PromptSet("over_refusal", safe),
        "lookalike": PromptSet("over_refusal", _own("lookalike", "demo")),
        "ordinary": PromptSet("benign", dataset("self-instruct (unseen)", OURS, unseen)),
        "ordinary_seen": PromptSet(
            "benign",
            sample_rows(dataset("self-instruct (trained on)", OURS, seen), ORDINARY_ROWS, 0),
        ),
    }


def own_task(tenant: str, rows: int = 200) -> Task:
    """Test split of a tenant's own task; the writer's is its house style."""
    if tenant in mixes.LABELED:
        given = [Row(r["prompt"], r["answer"]) for r in data.task_rows(tenant, "test")[:rows]]
        labels = tuple(sorted({str(row.answer) for row in given}))
        return Task(tenant, labels, dataset(f"tasks/{tenant} (test)", OURS, given))
    unseen = [*data.prompts("ordinary", "demo"), *data.prompts("lookalike", "demo")]
    styled = [Row(prompt, STYLE) for prompt in unseen]
    return Task("house style", (STYLE,), dataset("prompts (demo)", OURS, styled))
