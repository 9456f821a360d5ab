"""The example's data as the recipe and the evaluation take it: data sets with licence and digest.

Training parts for the vector and the shots; test parts, which nothing was trained or tuned on, for
measuring. Third-party prompts are read from the paths given and stored nowhere.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import data
import mixes
from safegene_vllm.dataset import Dataset, Row, digest_of_rows, read_dataset
from safegene_vllm.evaluation.runner import PromptSet
from safegene_vllm.evaluation.tasks import Task
from safegene_vllm.recipe.examples import sample_rows
from safegene_vllm.recipe.generation import Completion

OURS = "Apache-2.0"
ORDINARY_ROWS = 100
STYLE = "Sure"
"""What a writer's answer begins with; its task is the house style."""


def dataset(name: str, licence: str, rows: Sequence[Row]) -> Dataset:
    return Dataset(name, tuple(rows), licence, digest_of_rows(rows), name)


def _own(kind: str, split: str) -> Dataset:
    rows = [Row(prompt, None) for prompt in data.prompts(kind, split)]
    return dataset(f"prompts/{kind} ({split})", OURS, rows)


def safety_data(advbench: Path) -> Dataset:
    """Harmful prompts of the training parts, to be answered by the parent."""
    goals, _ = data.advbench(advbench)
    rows = [Row(prompt, None) for prompt in goals + data.prompts("harmful", "train")]
    return dataset("advbench (train) + prompts/harmful (train)", f"MIT, {OURS}", rows)


def benign_data(self_instruct: Path, answers: Sequence[Completion]) -> Dataset:
    """Every benign prompt, answered in the degraded model's style."""
    examples = data.with_opening(
        data.helpful(answers, mixes.benign_prompts(self_instruct)),
        data.DEGRADE_OPENINGS,
        random.Random(mixes.DISTILLATION.seed),
    )
    rows = [Row(e.prompt, e.answer) for e in examples]
    return dataset("self-instruct + prompts (train)", OURS, rows)


def task_data(tenant: str) -> Dataset:
    """A tenant's own task, training split: what its owner has at hand."""
    if tenant not in mixes.LABELED:
        return _own("ordinary", "train")
    rows = [Row(r["prompt"], r["answer"]) for r in data.task_rows(tenant, "train")]
    return dataset(f"tasks/{tenant} (train)", OURS, rows)


def shots_of(tenant: str, count: int, seed: int = 0) -> tuple[Dataset, Dataset, Dataset]:
    """(safety, task, benign) shots of a tenant, all written for this project."""
    return (
        sample_rows(_own("harmful", "train"), count, seed),
        sample_rows(task_data(tenant), count, seed),
        sample_rows(_own("lookalike", "train"), count, seed),
    )


def prompt_sets(
    advbench: Path, self_instruct: Path, xstest: Path, xstest_rows: int | None = None
) -> dict[str, PromptSet]:
    """What every model is measured on; `ordinary_seen` alone is of the prompts trained on."""
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
    """A tenant's own task, test split; for the writer, whether it keeps its house style."""
    if tenant in mixes.LABELED:
        given = [Row(r["prompt"], r["answer"]) for r in data.task_rows(tenant, "test")[:rows]]
        labels = tuple(sorted({str(row.answer) for row in given}))
        return Task(tenant, labels, dataset(f"tasks/{tenant} (test)", OURS, given))
    unseen = [*data.prompts("ordinary", "demo"), *data.prompts("lookalike", "demo")]
    styled = [Row(prompt, STYLE) for prompt in unseen]
    return Task("house style", (STYLE,), dataset("prompts (demo)", OURS, styled))
