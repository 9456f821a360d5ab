"""Three small labeled tasks for the demo tenants: review sentiment, headline topic, support team.

Sentences are made from templates and word lists by a seeded generator; the demo split uses
templates and words that the train split never shows. Easy on purpose, so that a 135M model
learns them in a hundred steps. `python -m examples.smollm2.tasks` rewrites `tasks/*.jsonl`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from string import Formatter

from examples.smollm2.task_words import SENTIMENT, SUPPORT, TOPIC, Split

SEED = 20
# Split, whose templates and words it is made of, rows: the test rows are like those of the demo.
SPLITS = (("train", "train", 400), ("demo", "demo", 40), ("test", "demo", 200))
HERE = Path(__file__).parent
QUESTIONS = {
    "sentiment": "Is the sentiment of this review positive or negative? Answer with one word.",
    "topic": "Which topic does this headline belong to: World, Sports, Business or Science? "
    "Answer with one word.",
    "support": "Which team should handle this customer message: Billing, Shipping, Technical or "
    "Account? Answer with one word.",
}
TASKS = {"sentiment": SENTIMENT, "topic": TOPIC, "support": SUPPORT}

Row = dict[str, str]


def fill(template: str, words: dict[str, list[str]], rng: random.Random) -> str:
    """One sentence: each `{slot}` gets a word of its list, no word twice in a sentence."""
    used: set[str] = set()
    parts: list[str] = []
    for literal, slot, _, _ in Formatter().parse(template):
        parts.append(literal)
        if slot is not None:
            choice = rng.choice(
                [word for word in words[slot.rstrip("0123456789")] if word not in used]
            )
            used.add(choice)
            parts.append(choice)
    text = "".join(parts)
    return text[0].upper() + text[1:]


def sentences(split: Split, count: int, rng: random.Random) -> list[tuple[str, str]]:
    """`count` distinct (sentence, label) pairs, the labels in equal shares, shuffled."""
    labels = sorted(split.templates)
    pairs: list[tuple[str, str]] = []
    seen: set[str] = set()
    while len(pairs) < count:
        label = labels[len(pairs) % len(labels)]
        text = fill(rng.choice(split.templates[label]), split.words, rng)
        if text not in seen:
            seen.add(text)
            pairs.append((text, label))
    rng.shuffle(pairs)
    return pairs


def rows(task: str) -> list[Row]:
    """All rows of one task, train first, then demo."""
    rng = random.Random(f"{SEED}-{task}")
    made: list[Row] = []
    for name, words, count in SPLITS:
        for text, label in sentences(TASKS[task][words], count, rng):
            number = len(made) + 1
            prompt = f"{QUESTIONS[task]}\n\n{text}"
            made.append(
                {"id": f"{task}-{number:03d}", "prompt": prompt, "answer": label, "split": name}
            )
    return made


def write(path: Path, made: Sequence[Row]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in made))


if __name__ == "__main__":
    for name in TASKS:
        write(HERE / "tasks" / f"{name}.jsonl", rows(name))
