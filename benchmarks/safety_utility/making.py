"""What must be there before anything is asked: the parent, and every method's LoRA per tenant.

Of the example's own stages only those are run whose output is missing. Training is in trained.py,
formulas in baselines.py; nothing is asked here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import data
import make_family
import mixes
import repairs
import trained
from make_family import show
from safegene_vllm.composition import merge_into, merged_weight_name
from safegene_vllm.errors import ConfigError
from safegene_vllm.formats.adapter import Adapter, LoRAWeights, load_adapter
from safegene_vllm.formats.checkpoint import read_checkpoint
from safegene_vllm.recipe.difference import of_adapter

EXAMPLE = data.HERE
ROUNDED_OTHERWISE = 0.01
"""Two ways to add in float32 may round a few entries to another bfloat16."""

ON_THE_DEGRADED = {"resta", "resta-dare"}

Made = Mapping[str, Sequence[tuple[repairs.Settings, Path]]]
"""Per method its candidates' settings and LoRA directories, published settings first."""


@dataclass(frozen=True)
class Places:
    """Where things are read from and written to; `build` holds the example's models as well."""

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

    def repair(self, tenant: str, method: str, settings: repairs.Settings) -> Path:
        return self.work / "repairs" / tenant / method / repairs.label_of(settings)


def needed_stages(places: Places, methods: Sequence[str]) -> list[str]:
    """The example's stages whose output is not there; those of `make family` that we rely on."""
    wanted = ["base", "parent-merged"]
    if ON_THE_DEGRADED & set(methods):
        wanted += ["answers", "degraded"]
    if "salora" in methods:
        wanted.append("answers")
    plan = make_family.stages(places.example)
    return [name for name in plan if name in wanted and not plan[name][0].exists()]


def prepare(places: Places, methods: Sequence[str]) -> None:
    """The parent, and what some methods need: the degraded copy, the base model's answers."""
    missing = needed_stages(places, methods)
    if missing:
        make_family.run(places.example, missing, force=False)
    check_parent(places)


def check_parent(places: Places) -> None:
    """ConfigError if the parent's checkpoint was merged from another LoRA than the example's."""
    site, lora = next(iter(sorted(load_adapter(EXAMPLE / "parent").lora_weights.items())))
    name = merged_weight_name(site)
    base, parent = (
        read_checkpoint(places.build / "smollm2" / which).read(name) for which in ("base", "parent")
    )
    differs = (merge_into(base, lora, 1.0) != parent).float().mean().item()
    if differs > ROUNDED_OTHERWISE:
        raise ConfigError(
            f"{places.parent} is not the base with the LoRA of {EXAMPLE / 'parent'} merged in "
            f"({differs:.0%} of {name} differ); delete that checkpoint, and it is made anew"
        )


def tenants_there(names: Sequence[str]) -> dict[str, Path]:
    """The example's tenants that have a LoRA. Errors: ConfigError naming those that have none."""
    known = {name: EXAMPLE / mixes.ADAPTERS[name].folder for name in mixes.TENANTS}
    if unknown := sorted(set(names) - set(known)):
        raise ConfigError(f"no tenant {', '.join(unknown)}; there are {', '.join(known)}")
    return {name: known[name] for name in (names or known)}


def parts_of(
    tenant: Path, places: Places, safety: Adapter | None, methods: Sequence[str]
) -> repairs.Parts:
    """The tenant's LoRA and what the methods know beside it; unused parts stay empty."""
    task = load_adapter(tenant)
    vector: dict[str, LoRAWeights] = {}
    if ON_THE_DEGRADED & set(methods):
        degraded = places.example.adapter("degraded")
        vector = dict(of_adapter(places.parent, degraded, "degraded").lora_weights)
    alignment = load_adapter(EXAMPLE / "parent").lora_weights
    return repairs.Parts(task, alignment, safety or Adapter({}, None, {}), vector)


def make_repairs(
    places: Places, tenant: str, methods: Sequence[str], parts: repairs.Parts, *, short: bool
) -> Made:
    """Every method's candidates for one tenant, as PEFT directories."""
    made: dict[str, list[tuple[repairs.Settings, Path]]] = {}
    for name in methods:
        method = repairs.METHODS[name]
        if name in repairs.ON_THE_VECTOR:
            continue
        made[name] = []
        for settings in method.grid[:1] if short else method.grid:
            out = places.repair(tenant, name, settings)
            if method.make is None:
                make_salora(places, tenant, settings, out, short=short)
            else:
                repairs.write_repair(name, parts, settings, out, mixes.PARENT_NAME)
            made[name].append((settings, out))
    return made


def make_salora(
    places: Places, tenant: str, settings: repairs.Settings, out: Path, *, short: bool
) -> None:
    print(f"{tenant}: SaLoRA, {repairs.label_of(settings)}", flush=True)
    sources = trained.sources_of(places.advbench, places.self_instruct, places.example.answers)
    trained.train_tenant(tenant, settings["lr"], places.parent, sources, out, show, short=short)
