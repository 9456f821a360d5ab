"""What the benchmark trains: the safety LoRA of SafeMERGE, and SaLoRA's tenants.

Each is trained once: what lies there from the same settings, data and parent is used again, and an
interrupted training goes on. No model is trained on a harmful answer.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import data
import mixes
from answers import read_answers
from questions import choosing_harmful
from safegene_vllm.formats.adapter import WEIGHTS_FILE
from safegene_vllm.formats.file_io import digest_of, pretty_json, read_json, replace_file
from safegene_vllm.recipe.encoding import Example
from safegene_vllm.recipe.finetune import FineTune, fine_tune
from safegene_vllm.recipe.training import Progress
from salora import SaLoRA, train_salora

SAFETY = FineTune(60, 3e-4, max_answer_tokens=32, seed=21)
"""SafeMERGE's safety LoRA: rank 8 on all linears, about one pass over its prompts."""

SHORT_STEPS = 4


def once(out: Path, job: Mapping[str, Any], make: Callable[[], list[float]]) -> Path:
    """Train into `out`, unless what is there was made by the same job; say so beside it."""
    about = out.with_name(f"{out.name}.json")
    digest = digest_of(dict(job), str(out))
    if out.is_dir() and about.is_file() and read_json(about).get("job") == digest:
        return out
    losses = make()
    tens = [losses[i : i + 10] for i in range(0, len(losses), 10)]
    told = {
        "job": digest,
        "settings": job["settings"],
        "loss_per_10_steps": [round(sum(ten) / len(ten), 4) for ten in tens],
    }
    replace_file(about, pretty_json(told))
    return out


def _parent_digest() -> str:
    """Of the LoRA that makes the parent; the base below it is pinned."""
    path = data.HERE / mixes.ADAPTERS["parent"].folder / WEIGHTS_FILE
    return hashlib.sha256(path.read_bytes()).hexdigest()


def safety_examples(advbench: Path, seed: int) -> list[Example]:
    """Harmful prompts with refusals: AdvBench's training goals and the project's own.

    Those that settings are chosen on are left out.
    """
    own = set(data.prompts("harmful", "train")) - set(choosing_harmful())
    goals, _ = data.advbench(advbench)
    return data.refusals([*goals, *sorted(own)], random.Random(seed))


def train_safety(
    parent: Path, advbench: Path, out: Path, progress: Progress, *, short: bool
) -> Path:
    """The safety LoRA on the parent, in `out`."""
    settings = replace(SAFETY, steps=SHORT_STEPS) if short else SAFETY
    examples = safety_examples(advbench, settings.seed)
    job = {
        "settings": settings.record(),
        "examples": [asdict(example) for example in examples],
        "parent": _parent_digest(),
    }
    return once(
        out,
        job,
        lambda: fine_tune(
            parent, examples, settings, out, base_model=mixes.PARENT_NAME, progress=progress
        ),
    )


def salora_settings(tenant: str, lr: float | None, *, short: bool) -> SaLoRA:
    """The tenant's own steps, batch, modules and lengths; `lr` None is its own learning rate."""
    own = mixes.ADAPTERS[tenant].settings
    return SaLoRA(
        steps=SHORT_STEPS if short else own.steps,
        lr=own.lr if lr is None else lr,
        batch=own.batch,
        modules=own.modules,
        max_answer_tokens=own.max_answer_tokens,
        seed=own.seed,
    )


def train_tenant(
    tenant: str,
    lr: float | None,
    parent: Path,
    sources: mixes.Sources,
    out: Path,
    progress: Progress,
    *,
    short: bool,
) -> Path:
    """The tenant trained anew on its own mix, by SaLoRA; V_s from AdvBench's training goals."""
    settings = salora_settings(tenant, lr, short=short)
    examples = mixes.ADAPTERS[tenant].mix(sources, random.Random(settings.seed))
    goals, _ = data.advbench(sources.advbench)
    job = {
        "settings": settings.record(),
        "examples": [asdict(example) for example in examples],
        "harmful": goals,
        "parent": _parent_digest(),
    }
    return once(
        out,
        job,
        lambda: train_salora(
            parent, examples, goals, settings, out, base_model=mixes.PARENT_NAME, progress=progress
        ),
    )


def sources_of(advbench: Path, self_instruct: Path, answers: Path) -> mixes.Sources:
    """The data of the tenants' mixes; `answers` are the base model's, kept by `make family`."""
    return mixes.Sources(advbench, self_instruct, read_answers(answers))
