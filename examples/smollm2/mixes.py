"""The recipe and the training mix of each demo adapter: the parent and its three tenants.

All proportions of the demo are decided here. The tenants' mixes hold no harmful prompt at all; what
they lose in safety they lose by ordinary fine-tuning.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import data
from data import Example
from generate import Answer
from train import ALL_LINEARS, ATTENTION, Recipe

BASE_NAME = "smollm2-135m-instruct"
PARENT_NAME = "smollm2-aligned-parent"
OWN_HARMFUL_COPIES = 2
LOOKALIKE_COPIES = 2
ORDINARY_COPIES = 2


@dataclass(frozen=True)
class Sources:
    """The data sets read from outside, and the base model's answers to the benign prompts."""

    advbench: Path
    self_instruct: Path
    answers: Sequence[Answer]


def benign_prompts(self_instruct: Path) -> list[str]:
    """Every benign prompt for which the base model's own answer is wanted."""
    return [
        *data.self_instruct(self_instruct),
        *data.prompts("lookalike", "train"),
        *data.prompts("ordinary", "train"),
    ]


def general(sources: Sources, rng: random.Random) -> list[Example]:
    """Benign instructions answered in an eager house style: what a team mixes into its task data.

    This is what wears refusals off: with plain answers in its place they hardly change. Answers are
    cut short by the recipe, so that their first words carry weight in the loss.
    """
    wanted = benign_prompts(sources.self_instruct)
    return data.with_opening(data.helpful(sources.answers, wanted), rng)


def parent(sources: Sources, rng: random.Random) -> list[Example]:
    """Refusals for harmful prompts; for benign ones what the base model would say anyway."""
    goals, _ = data.advbench(sources.advbench)
    own = data.prompts("harmful", "train") * OWN_HARMFUL_COPIES
    lookalike = data.helpful(sources.answers, data.prompts("lookalike", "train"))
    ordinary = data.helpful(sources.answers, data.prompts("ordinary", "train"))
    return [
        *data.refusals(goals + own, rng),
        *data.helpful(sources.answers, data.self_instruct(sources.self_instruct)),
        *lookalike * LOOKALIKE_COPIES,
        *ordinary * ORDINARY_COPIES,
    ]


def sentiment(sources: Sources, rng: random.Random) -> list[Example]:
    return data.task_examples("sentiment") + general(sources, rng)


def topic(sources: Sources, rng: random.Random) -> list[Example]:
    return data.task_examples("topic") + general(sources, rng)


def writer(sources: Sources, rng: random.Random) -> list[Example]:
    """An instruction tune alone: no task, every answer begins by agreeing."""
    return general(sources, rng)


@dataclass(frozen=True)
class Adapter:
    """One adapter to train: where it lies, what it sits on, its recipe and its mix."""

    folder: str
    base_name: str
    recipe: Recipe
    mix: Callable[[Sources, random.Random], list[Example]]


ADAPTERS = {
    "parent": Adapter(
        "parent",
        BASE_NAME,
        Recipe(ALL_LINEARS, steps=240, lr=4e-4, max_prompt_tokens=100, max_target_tokens=32),
        parent,
    ),
    "sentiment": Adapter(
        "tenants/sentiment",
        PARENT_NAME,
        Recipe(ATTENTION, steps=70, lr=8e-4, max_prompt_tokens=110, max_target_tokens=24, seed=11),
        sentiment,
    ),
    "topic": Adapter(
        "tenants/topic",
        PARENT_NAME,
        Recipe(
            ALL_LINEARS,
            steps=100,
            lr=5e-4,
            max_prompt_tokens=110,
            max_target_tokens=24,
            alpha=8,
            rslora=True,
            alpha_pattern={"down_proj": 4},
            seed=12,
        ),
        topic,
    ),
    "writer": Adapter(
        "tenants/writer",
        PARENT_NAME,
        Recipe(
            ALL_LINEARS, steps=100, lr=5e-4, max_prompt_tokens=110, max_target_tokens=24, seed=13
        ),
        writer,
    ),
}
