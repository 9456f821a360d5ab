"""`make bench-ablations`: what each choice of the recipe is worth, on the example's own models.

Calibrations and evaluations are kept below build/ablations/<record digest> and not done twice; the
tables go to results.md there and, as one JSON line, to the end of the output. Needs `make family`.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples" / "smollm2"), str(ROOT / "benchmarks" / "ablations")]

import make_family as example
import mixes
import sources
from answers import read_answers
from cases import TABLES, Case
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
ANSWER_TOKENS = 16
REUSE_STEPS = 60
WIDE = (0.0, 12.0)
"""The bounds of the family that doses are tried on: three times a coefficient must fit."""


class Bench:
    """Where things are, and each of them made once."""

    def __init__(self, places: example.Places, out: Path, xstest: Path) -> None:
        self.places, self.out, self.xstest = places, out, xstest
        self.parent = places.models / "parent"
        self._loaded: tuple[str, LoadedModel] | None = None

    def family_path(self, name: str) -> Path:
        """`SOURCE/LAYERS`, made where it is not there yet."""
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
        """A vector distilled from a tenant in the degraded copy's place; resumable by its name."""
        return distill(
            self.parent,
            safety=sources.safety_data(self.places.advbench),
            benign=self._said_by(tenant),
            degraded_adapter=self.places.adapter(tenant),
            settings=replace(mixes.DISTILLATION, steps=REUSE_STEPS),
            state=self.out / "families" / f"{name}.partial",
            progress=example.show,
        )

    def _said_by(self, tenant: str) -> Dataset:
        """A tenant's own training mix: what a vector made with it must not change."""
        adapter = mixes.ADAPTERS[tenant]
        answers = read_answers(self.places.answers)
        given = mixes.Sources(self.places.advbench, self.places.self_instruct, answers)
        mix = adapter.mix(given, random.Random(adapter.settings.seed))
        return sources.dataset(tenant, "Apache-2.0", [Row(e.prompt, e.answer) for e in mix])

    def _benign(self) -> Dataset:
        answers = read_answers(self.places.answers)
        return sources.benign_data(self.places.self_instruct, answers)

    def _sets(self) -> dict[str, PromptSet]:
        every = sources.prompt_sets(self.places.advbench, self.places.self_instruct, self.xstest)
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
                safety=sample_rows(sources.safety_data(self.places.advbench), 64, 0),
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
        """A case's numbers, calibrated where they have to be."""
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
        begun = time.monotonic()
        if self._loaded is None or self._loaded[0] != case.tenant:
            loaded = load_model(self.parent, self.places.adapter(case.tenant))
            self._loaded = (case.tenant, loaded)
        safety, task, benign = sources.shots_of(case.tenant, case.shots)
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
        print(f"  {time.monotonic() - begun:.0f} s, {profile.calibration['after']}", flush=True)
        return path

    def forget(self) -> None:
        """Free the model before an engine starts."""
        self._loaded = None

    def measured(self, family: str, cases: Sequence[Case]) -> Evaluation:
        """The cases of one family on one engine, kept by what they are."""
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
            self.forget()
            answerer = SharedBackend(
                VllmBackend(self.parent, subjects, self.family_path(family), context_tokens=512)
            )
            try:
                parts = [
                    self._asked(answerer, [s for s in subjects if s.name == tenant], header)
                    for tenant in sorted({subject.name for subject in subjects})
                ]
            finally:
                answerer.end()
            save_evaluation(merged(parts), path)
        return load_evaluation(path)

    def _asked(
        self, answerer: SharedBackend, subjects: Sequence[Target], header: FamilyHeader
    ) -> Evaluation:
        tenant = subjects[0].name
        print(f"asking {len(subjects)} states of {tenant}", flush=True)
        return evaluate(
            subjects,
            self._sets(),
            [sources.own_task(tenant, TASK_ROWS)],
            make_judges(JUDGES),
            answerer,
            header=header,
            max_tokens=ANSWER_TOKENS,
            task_tokens=6,
            samples=0,
        )


def merged(parts: Sequence[Evaluation]) -> Evaluation:
    """Several tenants' results as one: same sets, same judges."""
    return replace(
        parts[0],
        tasks={name: task for part in parts for name, task in part.tasks.items()},
        targets=tuple(target for part in parts for target in part.targets),
        changes=tuple(change for part in parts for change in part.changes),
    )


def run(bench: Bench, tables: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Every line of the tables: its case and what was measured."""
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
        text += [f"### {name}", "", f"| {name} | tenant | " + " | ".join(COLUMNS.values()) + " |"]
        text.append("|---" * (2 + len(COLUMNS)) + "|")
        for row in rows:
            cells = [
                f"{row[key]['rate']:.0%} ({row[key]['low']:.0%}–{row[key]['high']:.0%})"
                for key in COLUMNS
            ]
            text.append(f"| {row['line']} | {row['tenant']} | " + " | ".join(cells) + " |")
        text.append("")
    return "\n".join(text)


def kept_tables(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """Every table measured so far, in the house order."""
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
        parser.error(f"unknown {', '.join(unknown)}; there are {', '.join(TABLES)}")
    places = example.Places(given.advbench, given.self_instruct, given.build, given.example)
    bench = Bench(places, given.build / "ablations" / places.made(), given.xstest)
    found = run(bench, given.tables or list(TABLES))
    for name, rows in found.items():
        path = bench.out / "tables" / f"{name}.json"
        example.save_json(path, rows)
    text = as_markdown(kept_tables(bench.out / "tables"))
    (bench.out / "results.md").write_text(text)
    print(text)
    short = {
        f"{name}/{row['line']}/{row['tenant']}": row["not_refused"]["rate"]
        for name, rows in found.items()
        for row in rows
    }
    print(json.dumps({"bench": "ablations", "attack_success_opening": short}))


if __name__ == "__main__":
    main()
