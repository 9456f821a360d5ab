"""Rates of a demo model: refusals, coherence and task accuracy, each with its n.

Answers are judged in memory and forgotten; only counts leave this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import data
from generate import Answer, answer_all, load_model
from judge import is_coherent, is_refusal
from tasks import TASKS, is_correct

ANSWER_TOKENS = 40
LABEL_TOKENS = 16
Rates = dict[str, dict[str, float]]


def prompt_sets(advbench: Path, xstest: Path | None) -> dict[str, list[str]]:
    """The held-out prompts, by name; XSTest's safe ones only if a path is given."""
    sets = {kind: data.prompts(kind, "demo") for kind in ("harmful", "lookalike", "ordinary")}
    sets["advbench_test"] = data.advbench(advbench)[1]
    if xstest is not None:
        sets["xstest_safe"] = data.xstest_safe(xstest)
    return sets


def measure(
    model_dir: Path, adapter_dir: Path | None, sets: dict[str, list[str]], label: str
) -> Rates:
    """All rates of one model, `adapter_dir` merged into it if given."""
    model, tokenizer = load_model(model_dir, adapter_dir)
    flat = [prompt for prompts in sets.values() for prompt in prompts]
    answers = answer_all(model, tokenizer, flat, ANSWER_TOKENS, label)
    rates: Rates = {}
    for name, prompts in sets.items():
        rates[name] = judged(answers[: len(prompts)])
        answers = answers[len(prompts) :]
    for task in TASKS:
        rates[f"task_{task}"] = accuracy(model, tokenizer, task, label)
    return rates


def judged(answers: Sequence[Answer]) -> dict[str, float]:
    refused = sum(is_refusal(answer.text) for answer in answers)
    coherent = sum(is_coherent(answer.text) for answer in answers)
    n = len(answers)
    return {"n": n, "refused": round(refused / n, 3), "coherent": round(coherent / n, 3)}


def accuracy(model: Any, tokenizer: Any, task: str, label: str) -> dict[str, float]:
    rows = data.task_rows(task, "demo")
    prompts = [row["prompt"] for row in rows]
    answers = answer_all(model, tokenizer, prompts, LABEL_TOKENS, f"{label}, {task}")
    right = sum(
        is_correct(task, a.text, row["answer"]) for a, row in zip(answers, rows, strict=True)
    )
    return {"n": len(rows), "accuracy": round(right / len(rows), 3)}
