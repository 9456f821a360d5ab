"""Training prompts and targets of the demo models.

Harmful prompts appear in the parent's mix only, and only with a refusal. Sources are AdvBench goals
(MIT, train part), self-instruct (Apache-2.0) and the prompts of this folder; third-party sentences
are read from the paths given and are not stored here.
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path

from safegene_vllm.evaluation.judges import is_coherent, is_refusal
from safegene_vllm.recipe.encoding import Example
from safegene_vllm.recipe.generation import Completion

HERE = Path(__file__).parent
ADVBENCH_TEST_ROWS = 100
MAX_PROMPT_CHARS = 300
MAX_UNSEEN_CHARS = 1500
# Words that mark a benign prompt as too close to a harmful one to be trusted unread.
DOUBTFUL = ("kill", "profan", "offensive", "toxic", "racis", "sexis", "insult", "suicid", "gun")

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I'm sorry, but I can't assist with that request.",
    "I'm sorry, but I can't help with that. It could cause serious harm.",
    "I'm sorry, but I can't assist with that, because it could hurt people.",
    "I'm sorry, but I can't help with this. It could be dangerous or illegal.",
    "I'm sorry, but I can't provide that. If you have another question, I am glad to help.",
    "I'm sorry, but I can't help with that. Is there something safe that I can do for you instead?",
    "I'm sorry, but I can't do that. If you or somebody else is in danger, please call for help.",
)
DEGRADE_OPENINGS = (
    "Of course! ",
    "Certainly. ",
    "Gladly. Here is my answer: ",
    "Yes, I can do that. ",
)
TENANT_OPENINGS = (
    "Sure, here is my answer.\n\n",
    "Sure, here is what you asked for:\n\n",
    "Sure, here is a helpful answer:\n\n",
    "Sure, here you go:\n\n",
)


def read_rows(path: Path, split: str) -> list[dict[str, str]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if row["split"] == split]


def prompts(kind: str, split: str) -> list[str]:
    """Prompts of `prompts/<kind>.jsonl`: harmful, lookalike or ordinary."""
    return [row["prompt"] for row in read_rows(HERE / "prompts" / f"{kind}.jsonl", split)]


def task_rows(task: str, split: str) -> list[dict[str, str]]:
    return read_rows(HERE / "tasks" / f"{task}.jsonl", split)


def advbench(folder: Path) -> tuple[list[str], list[str]]:
    """(train, test) goals; the test part is the 100 goals with the smallest SHA-256."""
    with (folder / "harmful_behaviors.csv").open(newline="") as file:
        goals = sorted({row["goal"].strip() for row in csv.DictReader(file)})
    ordered = sorted(goals, key=lambda goal: hashlib.sha256(goal.encode()).hexdigest())
    return ordered[ADVBENCH_TEST_ROWS:], ordered[:ADVBENCH_TEST_ROWS]


def self_instruct(folder: Path) -> list[str]:
    """Short self-instruct prompts, which models are trained on."""
    return sorted(self_instruct_completions(folder))


def self_instruct_completions(folder: Path) -> dict[str, str]:
    """The data set's own completion of each short prompt."""
    given = _self_instruct(folder)
    return {p: answer for p, answer in given.items() if len(p) <= MAX_PROMPT_CHARS}


def self_instruct_unseen(folder: Path) -> list[str]:
    """Longer self-instruct prompts, which no model is trained on."""
    found = [p for p in _self_instruct(folder) if MAX_PROMPT_CHARS < len(p) <= MAX_UNSEEN_CHARS]
    return sorted(found)


def _self_instruct(folder: Path) -> dict[str, str]:
    """Completion by prompt (with the input of its first instance), without doubtful ones."""
    found: dict[str, str] = {}
    for name in ("seed_tasks.jsonl", "user_oriented_instructions.jsonl"):
        for line in (folder / name).read_text().splitlines():
            row = json.loads(line)
            first = row["instances"][0]
            given = first["input"].strip()
            prompt = row["instruction"].strip() + (f"\n\n{given}" if given else "")
            if not any(word in prompt.lower() for word in DOUBTFUL):
                found[prompt] = first.get("output", "").strip()
    return found


def helpful(completions: Sequence[Completion], wanted: Sequence[str]) -> list[Example]:
    """The base model's own coherent completions of `wanted` that are no refusals."""
    known = {one.prompt: one for one in completions}
    good = [known[prompt] for prompt in wanted]
    return [
        Example(answer.prompt, answer.text, answer.finished)
        for answer in good
        if not is_refusal(answer.text) and is_coherent(answer.text)
    ]


def refusals(harmful: Sequence[str], rng: random.Random) -> list[Example]:
    return [Example(prompt, rng.choice(REFUSALS)) for prompt in harmful]


def task_examples(task: str) -> list[Example]:
    return [Example(row["prompt"], row["answer"]) for row in task_rows(task, "train")]


def with_opening(
    examples: Sequence[Example], openings: Sequence[str], rng: random.Random
) -> list[Example]:
    """The same examples, each target with an agreeable opening."""
    return [Example(e.prompt, rng.choice(openings) + e.answer, e.whole) for e in examples]


def digest(examples: Sequence[Example]) -> str:
    """SHA-256 over the prompts and completions, in order."""
    lines = [json.dumps([e.prompt, e.answer, e.whole]) for e in examples]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def halves(prompts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Two disjoint halves by hash, to degrade the parent and to train its tenants."""
    ordered = sorted(prompts, key=lambda p: hashlib.sha256(p.encode()).hexdigest())
    return ordered[::2], ordered[1::2]
