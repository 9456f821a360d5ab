"""`make bench-ablations`: the effect of each choice of the recipe, on the example's own models.

Which vector, layers, examples and coefficients, on which tenant. Calibrations and evaluations are
cached below build/ablations/<record digest>, next to the tables in results.md. Needs `make family`.
Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.results import ROOT, markdown, print_result
from benchmarks.safety_utility import report
from benchmarks.safety_utility.prompts import ATTACK, ORDINARY, OVER_REFUSAL
from examples.smollm2 import datasets, mixes
from examples.smollm2 import make_family as example
from safegene_vllm.dataset import Row, digest_of_rows
from safegene_vllm.evaluation.backends import SharedBackend
from safegene_vllm.evaluation.judges import make_judges
from safegene_vllm.evaluation.results import load_evaluation, save_evaluation
from safegene_vllm.evaluation.runner import PromptSet, evaluate
from safegene_vllm.evaluation.statistics import Rate
from safegene_vllm.evaluation.targets import Target
from safegene_vllm.formats.family import Family, load_family, make_family, save_family
from safegene_vllm.formats.file_io import replace_file
from safegene_vllm.formats.profile import check_profile, load_profile, save_profile
from safegene_vllm.offline.generation_backend import VllmBackend
from safegene_vllm.recipe.calibration import calibrate
from safegene_vllm.recipe.difference import as_family, between_checkpoints, lora_norm, of_adapter
from safegene_vllm.recipe.distillation import distill
from safegene_vllm.recipe.examples import sample_rows
from safegene_vllm.recipe.model import load_model
from safegene_vllm.recipe.selection import Contrast, contrast, select
from safegene_vllm.recipe.training import Run

ROWS = {ATTACK: 60, OVER_REFUSAL: 40, ORDINARY: 40}
TASK_ROWS = 40
OUTPUT_TOKENS = 16
REUSE_STEPS = 60
WIDE = (0.0, 12.0)
"""Bounds of the family for multiples of the calibrated coefficients: three times one must fit."""
TENANTS = ("sentiment", "topic", "support", "writer")
OURS = "distilled/contrast"


@dataclass(frozen=True)
class Case:
    """One tenant with one family: calibrated, or at a fixed coefficient or a multiple of ours."""

    line: str
    tenant: str = "topic"
    family: str = OURS
    examples: int = 16
    tied: bool = False
    fixed: float | None = None
    times: float | None = None

    @property
    def calibration(self) -> str | None:
        """Name of the calibration; None if the coefficients are fixed or a multiple."""
        if self.fixed is not None or self.times is not None:
            return None
        tied = "-tied" if self.tied else ""
        return f"{self.tenant}-{self.family.replace('/', '-')}-{self.examples}{tied}"

    @property
    def state(self) -> str:
        if self.times is not None:
            return f"times-{self.times}"
        return self.calibration or f"{self.family}-fixed-{self.fixed}"


MADE_WITH_TOPIC = "from-topic/all"
"""A vector distilled with a tenant's training in place of the degraded copy."""

TABLES: dict[str, list[Case]] = {
    "strength": [
        Case(f"x{times:g}", tenant, "wide/contrast", times=times)
        for tenant in TENANTS
        for times in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
    ],
    "fixed": [
        case
        for tenant in TENANTS
        for case in (Case("calibrated", tenant), Case("1 on every layer", tenant, fixed=1.0))
    ],
    "tied": [
        case
        for tenant in ("topic", "writer")
        for case in (
            Case("one per layer", tenant),
            Case("one for all layers", tenant, tied=True),
        )
    ],
    "source": [
        Case("distilled"),
        *(Case(name, family=f"{name}/all") for name in ("minus-degradation", "refusal-lora")),
        Case("svd-16", family="svd-16/all"),
        Case("distilled, all layers", family="distilled/all"),
    ],
    "layers": [
        Case(name, family=f"distilled/{name}")
        for name in ("contrast", "residual", "random", "norm", "all")
    ],
    "examples": [Case(str(count), examples=count) for count in (4, 8, 16, 32, 64)],
    "reuse": [
        case
        for family, line in (
            (OURS, "ours, made with no task"),
            (MADE_WITH_TOPIC, "made with topic"),
        )
        for tenant in TENANTS
        for case in (
            Case(line, tenant, family),
            Case(f"{line.split(',')[0]}, coefficient 1", tenant, family, fixed=1.0),
        )
    ],
}


class Bench:
    """Vectors, calibrations and evaluations, each made once below `out`."""

    def __init__(
        self, places: example.Places, out: Path, xstest: Path, rows: int | None = None
    ) -> None:
        self.places, self.out, self.xstest, self.rows = places, out, xstest, rows
        self.parent = places.models / "parent"

    def family_path(self, name: str) -> Path:
        """The family `SOURCE/LAYERS`, made if it is missing."""
        if name == OURS:
            return self.places.out / "family"
        path = self.out / "families" / name.replace("/", "-")
        if not path.exists():
            print(f"making the vector {name}", flush=True)
            save_family(self._make(*name.split("/")), path)
        return path

    def family(self, name: str) -> Family:
        return load_family(self.family_path(name))

    def _make(self, source: str, layers: str) -> Family:
        places = self.places
        if source == "distilled":
            whole = load_family(places.models / "vector")
            return whole if layers == "all" else self._cut(whole, layers)
        if source == "wide":
            ours = load_family(places.out / "family")
            h = ours.header
            weights = ours.lora_weights
            return make_family(
                source, h.base, weights, layers=h.layers, bounds=WIDE, recipe=h.recipe
            )
        if source.startswith("from-"):
            return self._distilled_with(source.removeprefix("from-"), source)
        base = places.models / "base"
        if source == "minus-degradation":
            found = of_adapter(self.parent, places.adapter("degraded"), "degraded")
        elif source == "refusal-lora":
            found = of_adapter(base, places.out / "parent", "aligned")
        else:
            assert source == "svd-16", source
            found = between_checkpoints(self.parent, base, rank=16)
        return as_family(found, source)

    def _distilled_with(self, tenant: str, name: str) -> Family:
        """Distill a vector with a tenant's training instead of the degraded copy; resumable."""
        places, adapter = self.places, mixes.ADAPTERS[tenant]
        completions = datasets.read_completions(places.completions)
        sources = mixes.Sources(places.advbench, places.self_instruct, completions)
        mix = adapter.mix(sources, random.Random(adapter.settings.seed))
        rows = [Row(e.prompt, e.answer) for e in mix]
        made = distill(
            self.parent,
            safety=datasets.safety_data(places.advbench),
            benign=datasets.dataset(tenant, "Apache-2.0", rows),
            degraded_adapter=places.adapter(tenant),
            settings=replace(mixes.DISTILLATION, steps=REUSE_STEPS),
            state=self.out / "families" / f"{name}.partial",
            progress=example.show,
        )
        return make_family(name, made.base, made.lora_weights, recipe=made.recipe)

    def _sets(self) -> dict[str, PromptSet]:
        every = datasets.prompt_sets(self.places.advbench, self.places.self_instruct, self.xstest)
        return {
            name: replace(every[name], data=sample_rows(every[name].data, self.rows or rows, 0))
            for name, rows in ROWS.items()
        }

    def _cut(self, whole: Family, layers: str) -> Family:
        k, carrying = mixes.LAYERS_KEPT, [entry.layer for entry in whole.header.layers]
        if layers == "residual":
            places = self.places
            completions = datasets.read_completions(places.completions)
            benign = datasets.benign_data(places.self_instruct, completions)
            found = contrast(
                load_model(self.parent, places.adapter("degraded")),
                whole,
                safety=sample_rows(datasets.safety_data(places.advbench), 64, 0),
                others=[sample_rows(benign, 64, 0)],
                stream="residual",
            )
            return select(whole, found, k)
        if layers == "random":
            chosen = random.Random(0).sample(carrying, k)
        else:
            norms = dict.fromkeys(carrying, 0.0)
            for site, lora in whole.lora_weights.items():
                norms[int(site.split(".")[2])] += lora_norm(lora) ** 2
            chosen = sorted(carrying, key=lambda n: -norms[n])[:k]
        nothing = Contrast((0.0,) * len(carrying), (0.0,) * len(carrying), 1.0, "update")
        return select(whole, nothing, k, layers=chosen)

    def coefficients(self, case: Case) -> tuple[float, ...]:
        """A case's coefficients, calibrated if needed."""
        header = self.family(case.family).header
        if case.fixed is not None:
            layers = {entry.layer for entry in header.layers}
            return tuple(case.fixed if n in layers else 0.0 for n in range(header.num_layers))
        if case.times is not None or case.calibration == Case("", case.tenant).calibration:
            profile = load_profile(self.places.adapter(case.tenant))
        else:
            profile = load_profile(self._calibrated(case))
            check_profile(profile, header)
        times = 1.0 if case.times is None else case.times
        return tuple(times * value for value in profile.coefficients)

    def _calibrated(self, case: Case) -> Path:
        path = self.out / "profiles" / str(case.calibration)
        if not path.exists():
            print(f"calibrating {case.calibration}", flush=True)
            safety, task, benign = datasets.few_shot_data(case.tenant, case.examples)
            profile = calibrate(
                load_model(self.parent, self.places.adapter(case.tenant)),
                self.family(case.family),
                safety=safety,
                task=task,
                benign=benign,
                settings=replace(mixes.CALIBRATION, tied=case.tied),
                run=Run(None, {}),
            )
            save_profile(profile, path)
        return path

    def measured(self, family: str, cases: Sequence[Case]) -> dict[Case, dict[str, Rate]]:
        """Evaluate the cases of one family on one engine; cached by tenant and coefficients."""
        targets = {
            case: Target(
                case.tenant, case.state, self.places.adapter(case.tenant), self.coefficients(case)
            )
            for case in cases
        }
        path, every = self.family_path(family), list(dict.fromkeys(targets.values()))
        backend = SharedBackend(VllmBackend(self.parent, every, path, context_tokens=512))
        rates: dict[str, dict[str, Rate]] = {}
        try:
            for tenant in sorted({target.name for target in every}):
                own = [target for target in every if target.name == tenant]
                key = digest_of_rows([Row(t.key, str(t.coefficients)) for t in own])[7:19]
                cached = self.out / "evaluations" / f"{family.replace('/', '-')}-{key}.json"
                if not cached.exists():
                    print(f"evaluating {len(own)} states of {tenant}", flush=True)
                    found = evaluate(
                        own,
                        self._sets(),
                        [datasets.own_task(tenant, self.rows or TASK_ROWS)],
                        make_judges(report.JUDGES),
                        backend,
                        header=self.family(family).header,
                        max_tokens=OUTPUT_TOKENS,
                        task_tokens=6,
                        samples=0,
                    )
                    save_evaluation(found, cached)
                result = load_evaluation(cached)
                rates |= {target.key: report.measures(target) for target in result.targets}
        finally:
            backend.end()
        return {case: rates[target.key] for case, target in targets.items()}


Found = dict[str, list[tuple[Case, dict[str, Rate]]]]
"""Every case of a table with its rates."""


def run(bench: Bench, tables: Sequence[str]) -> Found:
    """Every line of the tables with its rates; one engine per family."""
    wanted = [case for name in tables for case in TABLES[name]]
    rates: dict[Case, dict[str, Rate]] = {}
    for family in dict.fromkeys(case.family for case in wanted):
        rates |= bench.measured(family, [case for case in wanted if case.family == family])
    return {name: [(case, rates[case]) for case in TABLES[name]] for name in tables}


def as_markdown(found: Found) -> str:
    """One table per ablation: a row per line and tenant, rates in percent with their interval."""
    text = []
    for name, cases in found.items():
        rows = [
            (
                case.line,
                case.tenant,
                *(f"{r.rate:.0%} ({r.low:.0%}–{r.high:.0%})" for r in rates.values()),
            )
            for case, rates in cases
        ]
        heading = (name, "tenant", *report.COLUMNS.values())
        text += [f"### {name}", "", *markdown((heading, rows)), ""]
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", nargs="*", default=[], help=f"some of {', '.join(TABLES)}")
    parser.add_argument("--advbench", type=Path, required=True, help="folder of AdvBench's CSV")
    parser.add_argument("--self-instruct", type=Path, required=True, help="folder of its JSONL")
    parser.add_argument("--xstest", type=Path, required=True, help="folder of XSTest's CSV")
    parser.add_argument("--rows", type=int, help="prompts a set (default: 40 to 60)")
    parser.add_argument("--build", type=Path, default=ROOT / "build")
    parser.add_argument("--example", type=Path, default=ROOT / "examples" / "smollm2")
    given = parser.parse_args()
    if unknown := sorted(set(given.tables) - set(TABLES)):
        parser.error(f"unknown {', '.join(unknown)}; expected some of {', '.join(TABLES)}")
    places = example.Places(given.advbench, given.self_instruct, given.build, given.example)
    name = places.made() + (f"-{given.rows}" if given.rows else "")
    bench = Bench(places, given.build / "ablations" / name, given.xstest, given.rows)
    found = run(bench, given.tables or list(TABLES))
    text = as_markdown(found)
    replace_file(bench.out / "results.md", text.encode())
    print(text)
    short = {
        f"{name}/{case.line}/{case.tenant}": rates["attack_success_opening"].rate
        for name, cases in found.items()
        for case, rates in cases
    }
    print_result("ablations", {"attack_success_opening": short})


if __name__ == "__main__":
    main()
