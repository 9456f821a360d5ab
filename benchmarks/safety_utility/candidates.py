"""Candidates: the parent, the safety LoRA, SaLoRA's tenants, and every method's LoRA per tenant.

Only missing stages of the example are run. Everything is trained once per settings, data and
parent, and an interrupted training continues. No model is trained on a harmful completion.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.safety_utility.methods import (
    METHODS,
    ON_THE_VECTOR,
    Parts,
    Settings,
    label_of,
    write_repair,
)
from benchmarks.safety_utility.prompts import choosing_harmful
from benchmarks.safety_utility.salora import SaLoRA, train_salora
from examples.smollm2 import data, make_family, mixes
from examples.smollm2.datasets import read_completions
from examples.smollm2.make_family import show
from safegene_vllm.composition import merge_into, merged_weight_name
from safegene_vllm.errors import ConfigError
from safegene_vllm.formats.adapter import WEIGHTS_FILE, Adapter, LoRAWeights, load_adapter
from safegene_vllm.formats.checkpoint import read_checkpoint
from safegene_vllm.formats.file_io import digest_of, pretty_json, read_json, replace_file
from safegene_vllm.recipe.difference import of_adapter
from safegene_vllm.recipe.encoding import Example
from safegene_vllm.recipe.finetune import FineTune, fine_tune

EXAMPLE = data.HERE
ROUNDING = 0.01
"""Share of entries that two ways to add in float32 may round to different bfloat16 values."""
SAFETY = FineTune(60, 3e-4, max_answer_tokens=32, seed=21)
"""SafeMERGE's safety LoRA: rank 8 on all linears, about one pass over its prompts."""
SHORT_STEPS = 4

Made = Mapping[str, Sequence[tuple[Settings, Path]]]
"""Candidates' settings and LoRA directories per method, published settings first."""


@dataclass(frozen=True)
class Places:
    """Input and output paths; `build` contains the example's models too."""

    advbench: Path
    self_instruct: Path
    xstest: Path
    build: Path
    work: Path

    @property
    def parent(self) -> Path:
        return self.build / "smollm2" / "parent"

    @property
    def family(self) -> Path:
        return EXAMPLE / "family"

    @property
    def example(self) -> make_family.Places:
        return make_family.Places(self.advbench, self.self_instruct, self.build, EXAMPLE)

    def repair(self, tenant: str, method: str, settings: Settings) -> Path:
        return self.work / "repairs" / tenant / method / label_of(settings)


def needed_stages(places: Places, methods: Sequence[str]) -> list[str]:
    """Stages of `make family` that are needed and whose output is missing."""
    wanted = {"base", "parent-merged"}
    if {"resta", "salora"} & set(methods):
        wanted.add("completions")
    if "resta" in methods:
        wanted.add("degraded")
    plan = make_family.stages(places.example)
    return [name for name in plan if name in wanted and not plan[name][0].exists()]


def prepare(places: Places, methods: Sequence[str]) -> None:
    """Make the parent, and what some methods need: degraded copy and base completions."""
    if missing := needed_stages(places, methods):
        make_family.run(places.example, missing, force=False)
    check_parent(places)


def check_parent(places: Places) -> None:
    """Raise ConfigError if the parent was merged from another LoRA than the example's."""
    site, lora = next(iter(sorted(load_adapter(EXAMPLE / "parent").lora_weights.items())))
    name = merged_weight_name(site)
    base, parent = (
        read_checkpoint(places.build / "smollm2" / which).read(name) for which in ("base", "parent")
    )
    differs = (merge_into(base, lora, 1.0) != parent).float().mean().item()
    if differs > ROUNDING:
        raise ConfigError(
            f"{places.parent} is not the base with the LoRA of {EXAMPLE / 'parent'} merged in "
            f"({differs:.0%} of {name} differ); delete that checkpoint and run this again"
        )


def tenant_paths(names: Sequence[str]) -> dict[str, Path]:
    """Directories of the named tenants (default: all). Raises: ConfigError."""
    known = {name: EXAMPLE / mixes.ADAPTERS[name].folder for name in mixes.TENANTS}
    if unknown := sorted(set(names) - set(known)):
        raise ConfigError(f"no tenant {', '.join(unknown)}; expected some of {', '.join(known)}")
    return {name: known[name] for name in (names or known)}


def parts_of(tenant: Path, places: Places, safety: Adapter | None, methods: Sequence[str]) -> Parts:
    """The tenant's LoRA and the other inputs of the methods; unused ones stay empty."""
    vector: dict[str, LoRAWeights] = {}
    if "resta" in methods:
        degraded = places.example.adapter("degraded")
        vector = dict(of_adapter(places.parent, degraded, "degraded").lora_weights)
    alignment = load_adapter(EXAMPLE / "parent").lora_weights
    return Parts(load_adapter(tenant), alignment, safety or Adapter({}, None, {}), vector)


def make_repairs(
    places: Places, tenant: str, methods: Sequence[str], parts: Parts, *, short: bool
) -> Made:
    """Write every method's candidates for one tenant as PEFT directories."""
    made: dict[str, list[tuple[Settings, Path]]] = {}
    for name in methods:
        if name in ON_THE_VECTOR:
            continue
        method, made[name] = METHODS[name], []
        for settings in method.grid[:1] if short else method.grid:
            out = places.repair(tenant, name, settings)
            if method.make is None:
                train_tenant(places, tenant, settings["lr"], out, short=short)
            else:
                write_repair(name, parts, settings, out, mixes.PARENT_NAME)
            made[name].append((settings, out))
    return made


def once(out: Path, job: Mapping[str, Any], make: Callable[[], list[float]]) -> Path:
    """Train into `out` and record the job next to it, unless the same job has made it."""
    about = out.with_name(f"{out.name}.json")
    digest = digest_of(dict(job), str(out))
    if out.is_dir() and about.is_file() and read_json(about).get("job") == digest:
        return out
    losses = make()
    tens = [losses[i : i + 10] for i in range(0, len(losses), 10)]
    record = {
        "job": digest,
        "settings": job["settings"],
        "loss_per_10_steps": [round(sum(ten) / len(ten), 4) for ten in tens],
    }
    replace_file(about, pretty_json(record))
    return out


def _job(settings: FineTune | SaLoRA, examples: Sequence[Example], **more: Any) -> dict[str, Any]:
    """Everything that a training depends on; the parent by the LoRA that makes it."""
    weights = EXAMPLE / mixes.ADAPTERS["parent"].folder / WEIGHTS_FILE
    return {
        "settings": settings.record(),
        "examples": [asdict(example) for example in examples],
        "parent": hashlib.sha256(weights.read_bytes()).hexdigest(),
        **more,
    }


def safety_examples(advbench: Path, seed: int) -> list[Example]:
    """Harmful prompts with refusals, without those that settings are chosen on."""
    own = set(data.prompts("harmful", "train")) - set(choosing_harmful())
    goals, _ = data.advbench(advbench)
    return data.refusals([*goals, *sorted(own)], random.Random(seed))


def train_safety(places: Places, *, short: bool) -> Path:
    """Train SafeMERGE's safety LoRA on the parent."""
    out = places.work / "safety-lora"
    settings = replace(SAFETY, steps=SHORT_STEPS) if short else SAFETY
    examples = safety_examples(places.advbench, settings.seed)
    print("safety LoRA", flush=True)

    def make() -> list[float]:
        return fine_tune(
            places.parent, examples, settings, out, base_model=mixes.PARENT_NAME, progress=show
        )

    return once(out, _job(settings, examples), make)


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


def train_tenant(places: Places, tenant: str, lr: float | None, out: Path, *, short: bool) -> Path:
    """Train the tenant on its own mix by SaLoRA; V_s from AdvBench's training goals."""
    settings = salora_settings(tenant, lr, short=short)
    completions = read_completions(places.example.completions)
    sources = mixes.Sources(places.advbench, places.self_instruct, completions)
    examples = mixes.ADAPTERS[tenant].mix(sources, random.Random(settings.seed))
    goals, _ = data.advbench(places.advbench)
    print(f"{tenant}: SaLoRA, lr {settings.lr}", flush=True)

    def make() -> list[float]:
        name = mixes.PARENT_NAME
        return train_salora(
            places.parent, examples, goals, settings, out, base_model=name, progress=show
        )

    return once(out, _job(settings, examples, harmful=goals), make)
