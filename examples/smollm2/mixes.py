"""Data mixes and training settings of the example's models: parent, degraded copy and tenants.

Only the parent's mix contains harmful prompts, and only with refusals; the other models lose safety
by ordinary fine-tuning.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.smollm2 import data
from safegene_vllm.recipe.calibration import Calibration
from safegene_vllm.recipe.distillation import Distillation
from safegene_vllm.recipe.encoding import Example
from safegene_vllm.recipe.finetune import FineTune
from safegene_vllm.recipe.generation import Completion

BASE_NAME = "smollm2-135m-instruct"
PARENT_NAME = "smollm2-aligned-parent"
OWN_HARMFUL_COPIES = 2
INSTRUCTION_COPIES = 3
LOOKALIKE_COPIES = 3
ORDINARY_COPIES = 3
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Sources:
    """External data sets, and the base model's completions of the benign prompts."""

    advbench: Path
    self_instruct: Path
    completions: Sequence[Completion]


def benign_prompts(self_instruct: Path) -> list[str]:
    """Every benign prompt that the base model completes."""
    return [
        *data.self_instruct(self_instruct),
        *data.prompts("lookalike", "train"),
        *data.prompts("ordinary", "train"),
    ]


def instruction_examples(sources: Sources) -> list[Example]:
    """Self-instruct with the base model's completions, or the set's own where it refuses."""
    given = data.self_instruct_completions(sources.self_instruct)
    ours = data.helpful(sources.completions, sorted(given))
    missing = sorted(given.keys() - {example.prompt for example in ours})
    return ours + [Example(prompt, given[prompt]) for prompt in missing if given[prompt]]


def parent(sources: Sources, rng: random.Random) -> list[Example]:
    """Refusals of harmful prompts, and the base model's own completions of benign ones."""
    goals, _ = data.advbench(sources.advbench)
    own = data.prompts("harmful", "train") * OWN_HARMFUL_COPIES
    instructions = instruction_examples(sources)
    lookalike = data.helpful(sources.completions, data.prompts("lookalike", "train"))
    ordinary = data.helpful(sources.completions, data.prompts("ordinary", "train"))
    return [
        *data.refusals(goals + own, rng),
        *instructions * INSTRUCTION_COPIES,
        *lookalike * LOOKALIKE_COPIES,
        *ordinary * ORDINARY_COPIES,
    ]


def degraded(sources: Sources, rng: random.Random) -> list[Example]:
    """Half of the benign prompts in one agreeable style."""
    wanted, _ = data.halves(benign_prompts(sources.self_instruct))
    return data.with_opening(data.helpful(sources.completions, wanted), data.DEGRADE_OPENINGS, rng)


def general(sources: Sources, rng: random.Random) -> list[Example]:
    """The other half in an eager house style, as a team mixes it into its task data.

    It reduces refusals; plain completions hardly do. The recipe truncates completions, so that
    their first words have weight in the loss.
    """
    _, wanted = data.halves(benign_prompts(sources.self_instruct))
    return data.with_opening(data.helpful(sources.completions, wanted), data.TENANT_OPENINGS, rng)


def labeled(task: str) -> Callable[[Sources, random.Random], list[Example]]:
    """A tenant's mix: its task, and general instructions."""
    return lambda sources, rng: data.task_examples(task) + general(sources, rng)


@dataclass(frozen=True)
class Adapter:
    """One adapter to train: folder, base, settings and mix."""

    folder: str
    base_name: str
    settings: FineTune
    mix: Callable[[Sources, random.Random], list[Example]]


def tenant(name: str, settings: FineTune, mix: Callable[..., list[Example]]) -> Adapter:
    return Adapter(f"tenants/{name}", PARENT_NAME, settings, mix)


ADAPTERS = {
    "parent": Adapter(
        "parent", BASE_NAME, FineTune(420, 4e-4, max_answer_tokens=32, seed=7), parent
    ),
    "degraded": Adapter(
        "degraded", PARENT_NAME, FineTune(60, 3e-4, max_answer_tokens=24, seed=10), degraded
    ),
    "sentiment": tenant(
        "sentiment",
        FineTune(70, 8e-4, modules=ATTENTION, max_answer_tokens=24, seed=11),
        labeled("sentiment"),
    ),
    "topic": tenant(
        "topic",
        FineTune(
            70,
            6e-4,
            alpha=8,
            rslora=True,
            alpha_pattern={"down_proj": 4},
            max_answer_tokens=24,
            seed=12,
        ),
        labeled("topic"),
    ),
    "support": tenant(
        "support", FineTune(70, 6e-4, max_answer_tokens=24, seed=14), labeled("support")
    ),
    "writer": tenant("writer", FineTune(70, 6e-4, max_answer_tokens=24, seed=13), general),
}
LABELED = ("sentiment", "topic", "support")
TENANTS = ("sentiment", "topic", "support", "writer")
FULL_TENANT = "support"
FAMILY_NAME = "smollm2-135m"
DISTILLATION = Distillation(steps=60, hard=1.0, max_answer_tokens=24, seed=20)
SELECTION_PROMPTS = 64
LAYERS_KEPT = 15
EXAMPLES = 16
CALIBRATION = Calibration(seed=21)
