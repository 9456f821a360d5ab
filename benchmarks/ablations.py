"""`make bench-ablations`: the effect of each choice of the recipe, on the example's own models.

Which vector, layers, examples and coefficients, on which tenant. Calibrations and evaluations are
cached below build/ablations/<record digest>; the tables go to results.md there and, as one JSON
line, to the end of the output. Needs `make family`.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.results import ROOT, markdown, print_result
from examples.smollm2 import datasets, mixes
from examples.smollm2 import make_family as example
from safegene_vllm.dataset import Dataset, Row, digest_of_rows
from safegene_vllm.evaluation.backends import SharedBackend
from safegene_vllm.evaluation.judges import make_judges
from safegene_vllm.evaluation.results import Evaluation, load_evaluation, save_evaluation
from safegene_vllm.evaluation.runner import PromptSet, evaluate
from safegene_vllm.evaluation.targets import Target
from safegene_vllm.formats.family import Family, FamilyHeader, load_family, make_family, save_family
from safegene_vllm.formats.profile import check_profile, load_profile, save_profile
from safegene_vllm.offline.generation_backend import VllmBackend
from safegene_vllm.recipe.calibration import calibrate
from safegene_vllm.recipe.difference import as_family, between_checkpoints, lora_norm, of_adapter
from safegene_vllm.recipe.distillation import Distilled, distill
from safegene_vllm.recipe.examples import sample_rows
from safegene_vllm.recipe.model import LoadedModel, load_model
from safegene_vllm.recipe.selection import Contrast, contrast, select
from safegene_vllm.recipe.training import Run

JUDGES = ("strings:advbench", "strings:opening", "coherence")
ROWS = {"advbench_test": 60, "xstest_safe": 40, "ordinary": 40}
TASK_ROWS = 40
OUTPUT_TOKENS = 16
REUSE_STEPS = 60
WIDE = (0.0, 12.0)
"""Bounds of the family for the dose table: three times a coefficient must fit."""


TENANTS = ("sentiment", "topic", "support", "writer")
ONE = "topic"
PAIR = ("topic", "writer")
"""Tenants of ablations with a calibration per line."""

MADE_WITH = ("topic",)
"""Tenants whose training replaces the degraded copy, to distill another vector."""

SOURCES = ("distilled", "minus-degradation", "refusal-lora", "svd-16")
LAYERS = ("contrast", "residual", "random", "norm", "all")
SHOTS = (4, 8, 16, 32, 64)
DOSES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)


@dataclass(frozen=True)
class Case:
    """One tenant with one family: calibrated, or at a fixed coefficient or a multiple of ours."""

    table: str
    line: str
    tenant: str
    family: str = "distilled/contrast"
    shots: int = 16
    tied: bool = False
    fixed: float | None = None
    times: float | None = None

    @property
    def calibration(self) -> str | None:
        """Name of the calibration; None if the coefficients are fixed or a multiple."""
        if self.fixed is not None or self.times is not None:
            return None
        tied = "-tied" if self.tied else ""
        return f"{self.tenant}-{self.family.replace('/', '-')}-{self.shots}{tied}"

    @property
    def state(self) -> str:
        if self.times is not None:
            return f"times-{self.times}"
        return self.calibration or f"{self.family}-fixed-{self.fixed}"


def dose() -> Iterator[Case]:
    for tenant in TENANTS:
        for times in DOSES:
            yield Case("dose", f"x{times:g}", tenant, "wide/contrast", times=times)


def fixed() -> Iterator[Case]:
    for tenant in TENANTS:
        yield Case("fixed", "calibrated", tenant)
        yield Case("fixed", "1 on every layer", tenant, fixed=1.0)


def tied() -> Iterator[Case]:
    for tenant in PAIR:
        yield Case("tied", "one per layer", tenant)
        yield Case("tied", "one for all layers", tenant, tied=True)


def source() -> Iterator[Case]:
    for name in SOURCES:
        layers = "contrast" if name == "distilled" else "all"
        yield Case("source", name, ONE, f"{name}/{layers}")
    yield Case("source", "distilled, all layers", ONE, "distilled/all")


def layers() -> Iterator[Case]:
    for name in LAYERS:
        yield Case("layers", name, ONE, f"distilled/{name}")


def shots() -> Iterator[Case]:
    for count in SHOTS:
        yield Case("shots", str(count), ONE, shots=count)


def reuse() -> Iterator[Case]:
    for tenant in TENANTS:
        ours = Case("reuse", "ours, made with no task", tenant)
        yield from (ours, replace(ours, line="ours, coefficient 1", fixed=1.0))
    for made_with in MADE_WITH:
        for tenant in TENANTS:
            case = Case("reuse", f"made with {made_with}", tenant, f"from-{made_with}/all")
            yield case
            yield replace(case, line=f"made with {made_with}, coefficient 1", fixed=1.0)


TABLES = {f.__name__: f for f in (dose, fixed, tied, source, layers, shots, reuse)}


class Bench:
    """Vectors, calibrations and evaluations, each made once below `out`."""

    def __init__(self, places: example.Places, out: Path, xstest: Path) -> None:
        self.places, self.out, self.xstest = places, out, xstest
        self.parent = places.models / "parent"
        self._loaded: tuple[str, LoadedModel] | None = None

    def family_path(self, name: str) -> Path:
        """The family `SOURCE/LAYERS`, made if it is missing."""
        if name == "distilled/contrast":
            return self.places.out / "family"
        path = self.out / "families" / name.replace("/", "-")
        if not path.exists():
            print(f"making the vector {name}", flush=True)
            source, layers = name.split("/")
            if source.startswith("from-"):
                made = self._distilled_with(source.removeprefix("from-"), source)
                family = make_family(source, made.base, made.lora_weights, recipe=made.recipe)
                save_family(family, path)
                made.run.clear()
            else:
                save_family(self._make(source, layers), path)
        return path

    def family(self, name: str) -> Family:
        return load_family(self.family_path(name))

    def _make(self, source: str, layers: str) -> Family:
        if source == "distilled":
            whole = load_family(self.places.models / "vector")
            return whole if layers == "all" else self._cut(whole, layers)
        if source == "wide":
            ours = load_family(self.places.out / "family")
            head = ours.header
            return make_family(
                source,
                head.base,
                ours.lora_weights,
                layers=head.layers,
                bounds=WIDE,
                recipe=head.recipe,
            )
        if source == "minus-degradation":
            adapter = self.places.adapter("degraded")
            return as_family(of_adapter(self.parent, adapter, "degraded"), source)
        if source == "refusal-lora":
            base = self.places.models / "base"
            return as_family(of_adapter(base, self.places.out / "parent", "aligned"), source)
        assert source == "svd-16", source
        base = self.places.models / "base"
        return as_family(between_checkpoints(self.parent, base, rank=16), source)

    def _distilled_with(self, tenant: str, name: str) -> Distilled:
        """Distill a vector from a tenant instead of the degraded copy; resumable by its name."""
        return distill(
            self.parent,
            safety=datasets.safety_data(self.places.advbench),
            benign=self._training_mix(tenant),
            degraded_adapter=self.places.adapter(tenant),
            settings=replace(mixes.DISTILLATION, steps=REUSE_STEPS),
            state=self.out / "families" / f"{name}.partial",
            progress=example.show,
        )

    def _training_mix(self, tenant: str) -> Dataset:
        """A tenant's own training mix, which its vector must not change."""
        adapter = mixes.ADAPTERS[tenant]
        answers = datasets.read_completions(self.places.answers)
        given = mixes.Sources(self.places.advbench, self.places.self_instruct, answers)
        mix = adapter.mix(given, random.Random(adapter.settings.seed))
        return datasets.dataset(tenant, "Apache-2.0", [Row(e.prompt, e.answer) for e in mix])

    def _benign(self) -> Dataset:
        answers = datasets.read_completions(self.places.answers)
        return datasets.benign_data(self.places.self_instruct, answers)

    def _sets(self) -> dict[str, PromptSet]:
        every = datasets.prompt_sets(self.places.advbench, self.places.self_instruct, self.xstest)
        return {
            name: replace(every[name], data=sample_rows(every[name].data, rows, 0))
            for name, rows in ROWS.items()
        }

    def _cut(self, whole: Family, layers: str) -> Family:
        k, carrying = mixes.LAYERS_KEPT, [entry.layer for entry in whole.header.layers]
        if layers == "residual":
            degraded = load_model(self.parent, self.places.adapter("degraded"))
            found = contrast(
                degraded,
                whole,
                safety=sample_rows(datasets.safety_data(self.places.advbench), 64, 0),
                others=[sample_rows(self._benign(), 64, 0)],
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
        family = self.family(case.family)
        layers = {entry.layer for entry in family.header.layers}
        count = family.header.num_layers
        if case.fixed is not None:
            return tuple(case.fixed if n in layers else 0.0 for n in range(count))
        ours = Case("", "", case.tenant)
        if case.times is not None or case.calibration == ours.calibration:
            found = load_profile(self.places.adapter(case.tenant)).coefficients
        else:
            profile = load_profile(self._calibrated(case, family))
            check_profile(profile, family.header)
            found = profile.coefficients
        times = 1.0 if case.times is None else case.times
        return tuple(times * value for value in found)

    def _calibrated(self, case: Case, family: Family) -> Path:
        path = self.out / "profiles" / str(case.calibration)
        if path.exists():
            return path
        print(f"calibrating {case.calibration}", flush=True)
        started = time.monotonic()
        if self._loaded is None or self._loaded[0] != case.tenant:
            loaded = load_model(self.parent, self.places.adapter(case.tenant))
            self._loaded = (case.tenant, loaded)
        safety, task, benign = datasets.few_shot_data(case.tenant, case.shots)
        settings = replace(mixes.CALIBRATION, tied=case.tied)
        profile = calibrate(
            self._loaded[1],
            family,
            safety=safety,
            task=task,
            benign=benign,
            settings=settings,
            run=Run(None, {}),
        )
        save_profile(profile, path)
        print(f"  {time.monotonic() - started:.0f} s, {profile.calibration['after']}", flush=True)
        return path

    def unload(self) -> None:
        """Free the model before an engine starts."""
        self._loaded = None

    def measured(self, family: str, cases: Sequence[Case]) -> Evaluation:
        """Evaluate the cases of one family on one engine; cached by their coefficients."""
        numbers = {case: self.coefficients(case) for case in cases}
        unique = {(case.tenant, numbers[case]): case for case in reversed(cases)}
        subjects = [
            Target(case.tenant, case.state, self.places.adapter(case.tenant), numbers[case])
            for case in unique.values()
        ]
        header = self.family(family).header
        key = digest_of_rows([Row(s.key, str(s.coefficients)) for s in subjects])[7:19]
        path = self.out / "evaluations" / f"{family.replace('/', '-')}-{key}.json"
        if not path.exists():
            self.unload()
            backend = SharedBackend(
                VllmBackend(self.parent, subjects, self.family_path(family), context_tokens=512)
            )
            try:
                parts = [
                    self._evaluate(backend, [s for s in subjects if s.name == tenant], header)
                    for tenant in sorted({subject.name for subject in subjects})
                ]
            finally:
                backend.end()
            save_evaluation(merged(parts), path)
        return load_evaluation(path)

    def _evaluate(
        self, backend: SharedBackend, subjects: Sequence[Target], header: FamilyHeader
    ) -> Evaluation:
        tenant = subjects[0].name
        print(f"evaluating {len(subjects)} states of {tenant}", flush=True)
        return evaluate(
            subjects,
            self._sets(),
            [datasets.own_task(tenant, TASK_ROWS)],
            make_judges(JUDGES),
            backend,
            header=header,
            max_tokens=OUTPUT_TOKENS,
            task_tokens=6,
            samples=0,
        )


def merged(parts: Sequence[Evaluation]) -> Evaluation:
    """Merge several tenants' results with equal sets and judges."""
    return replace(
        parts[0],
        tasks={name: task for part in parts for name, task in part.tasks.items()},
        targets=tuple(target for part in parts for target in part.targets),
        changes=tuple(change for part in parts for change in part.changes),
    )


def run(bench: Bench, tables: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Every line of the tables with its results."""
    wanted = [case for name in tables for case in TABLES[name]()]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in tables}
    for family in dict.fromkeys(case.family for case in wanted):
        cases = [case for case in wanted if case.family == family]
        result = bench.measured(family, cases)
        for case in cases:
            numbers = bench.coefficients(case)
            subject = next(
                s
                for s in result.targets
                if s.name == case.tenant and (s.coefficients or (0.0,) * len(numbers)) == numbers
            )
            found[case.table].append(
                {
                    "line": case.line,
                    "tenant": case.tenant,
                    "coefficients": list(numbers),
                    "attack_success": vars(subject.rates["advbench_test"]["strings:advbench"]),
                    "not_refused": vars(subject.rates["advbench_test"]["strings:opening"]),
                    "xstest_refused": vars(subject.rates["xstest_safe"]["strings:opening"]),
                    "ordinary_refused": vars(subject.rates["ordinary"]["strings:opening"]),
                    "coherent": vars(subject.rates["advbench_test"]["coherence"]),
                    "accuracy": vars(next(iter(subject.accuracy.values()))),
                }
            )
    return found


COLUMNS = {
    "not_refused": "attack success (opening)",
    "attack_success": "attack success (AdvBench strings)",
    "accuracy": "task right",
    "xstest_refused": "XSTest safe refused",
    "ordinary_refused": "ordinary refused",
    "coherent": "coherent",
}


def as_markdown(found: dict[str, list[dict[str, Any]]]) -> str:
    """One table per ablation: a row per line and tenant, rates in percent with their interval."""
    text = []
    for name, rows in found.items():
        lines = [
            (
                row["line"],
                row["tenant"],
                *(
                    f"{row[k]['rate']:.0%} ({row[k]['low']:.0%}–{row[k]['high']:.0%})"
                    for k in COLUMNS
                ),
            )
            for row in rows
        ]
        text += [f"### {name}", "", *markdown(((name, "tenant", *COLUMNS.values()), lines)), ""]
    return "\n".join(text)


def cached_tables(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """Every table measured so far."""
    paths = {name: directory / f"{name}.json" for name in TABLES}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", nargs="*", default=[], help=f"some of {', '.join(TABLES)}")
    parser.add_argument("--advbench", type=Path, required=True, help="folder of AdvBench's CSV")
    parser.add_argument("--self-instruct", type=Path, required=True, help="folder of its JSONL")
    parser.add_argument("--xstest", type=Path, required=True, help="folder of XSTest's CSV")
    parser.add_argument("--build", type=Path, default=ROOT / "build")
    parser.add_argument("--example", type=Path, default=ROOT / "examples" / "smollm2")
    given = parser.parse_args()
    if unknown := sorted(set(given.tables) - set(TABLES)):
        parser.error(f"unknown {', '.join(unknown)}; expected some of {', '.join(TABLES)}")
    places = example.Places(given.advbench, given.self_instruct, given.build, given.example)
    bench = Bench(places, given.build / "ablations" / places.made(), given.xstest)
    found = run(bench, given.tables or list(TABLES))
    for name, rows in found.items():
        path = bench.out / "tables" / f"{name}.json"
        example.save_json(path, rows)
    text = as_markdown(cached_tables(bench.out / "tables"))
    (bench.out / "results.md").write_text(text)
    print(text)
    short = {
        f"{name}/{row['line']}/{row['tenant']}": row["not_refused"]["rate"]
        for name, rows in found.items()
        for row in rows
    }
    print_result("ablations", {"attack_success_opening": short})


if __name__ == "__main__":
    main()
