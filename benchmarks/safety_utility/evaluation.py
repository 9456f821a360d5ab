"""Evaluation of every method's tenant: first to choose settings, then on held-out prompts.

All tenants of all methods are LoRAs on one engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.safety_utility import report
from benchmarks.safety_utility.candidates import Made, Places
from benchmarks.safety_utility.methods import (
    METHODS,
    CandidateRates,
    Settings,
    choice_record,
    choose,
    label_of,
)
from benchmarks.safety_utility.prompts import HARMFUL, HARMLESS, EvaluationPrompts, choosing_prompts
from examples.smollm2.make_family import show
from safegene_vllm.evaluation.backends import GenerationBackend, SharedBackend
from safegene_vllm.evaluation.judges import make_judges
from safegene_vllm.evaluation.response_cache import ResponseCache
from safegene_vllm.evaluation.results import Evaluation, TargetResult, save_evaluation
from safegene_vllm.evaluation.runner import evaluate
from safegene_vllm.evaluation.targets import AFTER, BEFORE, PARENT, Target, before_and_after
from safegene_vllm.formats.family import FamilyHeader
from safegene_vllm.formats.file_io import pretty_json, replace_file

OUTPUT_TOKENS = 24
CHOOSING_TOKENS = 24
LABEL_TOKENS = 16
ON_PARENT = Target("parent", PARENT)

Chosen = Mapping[str, Path]
"""The chosen LoRA of each method."""
Job = tuple[Sequence[Target], EvaluationPrompts]
"""Targets and prompts of one tenant."""


@dataclass(frozen=True, eq=False)
class Bench:
    """Common inputs. `backend_for` plans an engine for the given targets, started on first use."""

    places: Places
    header: FamilyHeader
    backend_for: Callable[[Sequence[Target]], GenerationBackend]

    def without_vector(self, name: str, state: str, directory: Path) -> Target:
        """A LoRA with the vector at coefficient 0."""
        return Target(name, state, directory, (0.0,) * self.header.num_layers)


def evaluate_jobs(bench: Bench, jobs: Mapping[str, Job], tokens: int) -> dict[str, Evaluation]:
    """Evaluate every tenant with all targets on one engine; completions are cached."""
    every = list(dict.fromkeys(target for targets, _ in jobs.values() for target in targets))
    backend = SharedBackend(bench.backend_for(every))
    cache = ResponseCache(bench.places.work / "answers.jsonl")
    found: dict[str, Evaluation] = {}
    try:
        for tenant, (targets, prompts) in jobs.items():
            print(f"{tenant}: {len(targets)} targets", flush=True)
            found[tenant] = evaluate(
                targets,
                prompts.sets,
                [prompts.task],
                make_judges(report.JUDGES),
                backend,
                header=bench.header,
                max_tokens=tokens,
                task_tokens=LABEL_TOKENS,
                samples=0,
                cache=cache,
                progress=show,
            )
    finally:
        cache.close()
        backend.end()
    return found


def candidate_rates(result: TargetResult) -> CandidateRates:
    """Rates of one target on the training split."""
    return CandidateRates(
        result.rates[HARMFUL][report.OPENING].rate,
        result.rates[HARMLESS][report.OPENING].rate,
        next(iter(result.accuracy.values())).rate,
    )


def _state(method: str, settings: Settings) -> str:
    return f"{method} {label_of(settings)}"


def choose_settings(
    bench: Bench, made: Mapping[str, Made]
) -> tuple[dict[str, Chosen], dict[str, dict[str, Any]]]:
    """Per tenant the chosen LoRA of each method, and by title the record of the choice.

    A method with one candidate has no choice.
    """
    jobs: dict[str, Job] = {}
    for tenant, methods in made.items():
        candidates = [
            bench.without_vector(tenant, _state(name, settings), out)
            for name, several in methods.items()
            if len(several) > 1
            for settings, out in several
        ]
        if candidates:
            before = bench.without_vector(tenant, BEFORE, methods["none"][0][1])
            jobs[tenant] = ((ON_PARENT, before, *candidates), choosing_prompts(tenant))
    found = evaluate_jobs(bench, jobs, CHOOSING_TOKENS) if jobs else {}
    chosen: dict[str, Chosen] = {}
    records: dict[str, dict[str, Any]] = {tenant: {} for tenant in made}
    for tenant, methods in made.items():
        directories = {name: candidates[0][1] for name, candidates in methods.items()}
        if tenant in found:
            rates = {target.key: candidate_rates(target) for target in found[tenant].targets}
            before_rates, parent_rates = rates[f"{tenant}/{BEFORE}"], rates[ON_PARENT.key]
            for name, several in methods.items():
                if len(several) > 1:
                    settings = [given for given, _ in several]
                    own = [rates[f"{tenant}/{_state(name, given)}"] for given in settings]
                    choice = choose(own, before_rates, parent_rates)
                    directories[name] = several[choice.number][1]
                    records[tenant][METHODS[name].title] = choice_record(settings, own, choice)
        chosen[tenant] = directories
        path = bench.places.work / f"{tenant}-chosen.json"
        replace_file(path, pretty_json(records[tenant]))
    return chosen, records


def final_targets(
    bench: Bench, tenant: str, directory: Path, methods: Sequence[str], chosen: Chosen
) -> list[Target]:
    """The parent, and the tenant once per method."""
    targets = [ON_PARENT]
    selected = {entry.layer for entry in bench.header.layers}
    ones = tuple(float(n in selected) for n in range(bench.header.num_layers))
    for name in methods:
        title = METHODS[name].title
        if name == "safegene":
            ours = before_and_after(tenant, directory, bench.header)
            targets += [target for target in ours if target.state == AFTER]
        elif name == "safegene-1":
            targets.append(Target(tenant, title, directory, ones))
        else:
            targets.append(bench.without_vector(tenant, report.state_of(title), chosen[name]))
    return targets


def compare(
    bench: Bench,
    tenants: Mapping[str, Path],
    methods: Sequence[str],
    chosen: Mapping[str, Chosen],
    prompts: Mapping[str, EvaluationPrompts],
) -> dict[str, Evaluation]:
    """Evaluate every tenant and method on the held-out prompts; write the results."""
    jobs: dict[str, Job] = {
        tenant: (final_targets(bench, tenant, path, methods, chosen[tenant]), prompts[tenant])
        for tenant, path in tenants.items()
    }
    found = evaluate_jobs(bench, jobs, OUTPUT_TOKENS)
    for tenant, evaluation in found.items():
        save_evaluation(evaluation, bench.places.work / f"{tenant}.json")
    return found
