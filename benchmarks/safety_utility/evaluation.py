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


@dataclass(frozen=True, eq=False)
class Bench:
    """Common inputs. `short`: few prompts, published settings, a few steps.

    `backend_for` plans an engine for the given subjects, which starts on first use.
    """

    places: Places
    header: FamilyHeader
    backend_for: Callable[[Sequence[Target]], GenerationBackend]
    short: bool = False


@dataclass(frozen=True)
class Job:
    """Targets and prompts of one tenant."""

    subjects: tuple[Target, ...]
    prompts: EvaluationPrompts


def evaluate_jobs(bench: Bench, jobs: Mapping[str, Job], tokens: int) -> dict[str, Evaluation]:
    """Evaluate every tenant with all subjects on one engine; completions are cached."""
    targets = list(dict.fromkeys(subject for job in jobs.values() for subject in job.subjects))
    backend = SharedBackend(bench.backend_for(targets))
    cache = ResponseCache(bench.places.work / "answers.jsonl")
    judges = make_judges(report.JUDGES)
    found: dict[str, Evaluation] = {}
    try:
        for tenant, job in jobs.items():
            print(f"{tenant}: {len(job.subjects)} subjects", flush=True)
            found[tenant] = evaluate(
                job.subjects,
                job.prompts.sets,
                [job.prompts.task],
                judges,
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


def unprotected(bench: Bench, name: str, state: str, directory: Path) -> Target:
    """A LoRA with the vector at coefficient 0."""
    return Target(name, state, directory, (0.0,) * bench.header.num_layers)


def measured(result: TargetResult) -> CandidateRates:
    """Rates of one subject on the training split."""
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

    A method with one candidate has no choice; with `short` the published settings are taken.
    """
    jobs: dict[str, Job] = {}
    for tenant, methods in made.items():
        grids = {name: candidates for name, candidates in methods.items() if len(candidates) > 1}
        if grids:
            before = unprotected(bench, tenant, BEFORE, methods["none"][0][1])
            candidates = [
                unprotected(bench, tenant, _state(name, settings), out)
                for name, several in grids.items()
                for settings, out in several
            ]
            jobs[tenant] = Job((ON_PARENT, before, *candidates), choosing_prompts(tenant))
    found = evaluate_jobs(bench, jobs, CHOOSING_TOKENS) if jobs else {}
    chosen: dict[str, Chosen] = {}
    records: dict[str, dict[str, Any]] = {}
    for tenant, methods in made.items():
        taken = {name: candidates[0][1] for name, candidates in methods.items()}
        records[tenant] = {}
        if tenant in found:
            results = {subject.key: measured(subject) for subject in found[tenant].targets}
            for name, several in methods.items():
                if len(several) > 1:
                    number, record = _chosen(tenant, name, [s for s, _ in several], results)
                    taken[name] = several[number][1]
                    records[tenant][METHODS[name].title] = record
        chosen[tenant] = taken
        path = bench.places.work / f"{tenant}-chosen.json"
        replace_file(path, pretty_json(records[tenant]))
    return chosen, records


def _chosen(
    tenant: str,
    method: str,
    settings: Sequence[Settings],
    results: Mapping[str, CandidateRates],
) -> tuple[int, dict[str, Any]]:
    candidates = [results[f"{tenant}/{_state(method, given)}"] for given in settings]
    choice = choose(candidates, results[f"{tenant}/{BEFORE}"], results[ON_PARENT.key])
    return choice.number, choice_record(settings, candidates, choice)


def final_subjects(
    bench: Bench, tenant: str, directory: Path, methods: Sequence[str], chosen: Chosen
) -> list[Target]:
    """The parent, and the tenant once per method."""
    subjects = [ON_PARENT]
    selected = {entry.layer for entry in bench.header.layers}
    ones = tuple(float(n in selected) for n in range(bench.header.num_layers))
    for name in methods:
        title = METHODS[name].title
        if name == "safegene":
            ours = before_and_after(tenant, directory, bench.header)
            subjects += [subject for subject in ours if subject.state == AFTER]
        elif name == "safegene-1":
            subjects.append(Target(tenant, title, directory, ones))
        else:
            state = report.state_of(title)
            subjects.append(unprotected(bench, tenant, state, chosen[name]))
    return subjects


def compare(
    bench: Bench,
    tenants: Mapping[str, Path],
    methods: Sequence[str],
    chosen: Mapping[str, Chosen],
    prompts: Mapping[str, EvaluationPrompts],
) -> dict[str, Evaluation]:
    """Evaluate every tenant and method on the held-out prompts; write the results."""
    jobs = {
        tenant: Job(
            tuple(final_subjects(bench, tenant, directory, methods, chosen[tenant])),
            prompts[tenant],
        )
        for tenant, directory in tenants.items()
    }
    found = evaluate_jobs(bench, jobs, OUTPUT_TOKENS)
    for tenant, evaluation in found.items():
        save_evaluation(evaluation, bench.places.work / f"{tenant}.json")
    return found
