"""One evaluation run: generate all responses, free the model, run the judges, count the rates.

Responses stay in memory; the result holds rates and a few samples, harmful ones withheld.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from safegene_vllm import __version__
from safegene_vllm.dataset import Dataset
from safegene_vllm.errors import ConfigError, SafegeneError, raise_errors
from safegene_vllm.evaluation.backends import GenerationBackend
from safegene_vllm.evaluation.generation import CHUNK, Progress, Responses, generate_all, silent
from safegene_vllm.evaluation.judges import Judge, judge_record
from safegene_vllm.evaluation.response_cache import ResponseCache
from safegene_vllm.evaluation.results import (
    Change,
    Evaluation,
    FamilyRecord,
    LayerScore,
    Overlap,
    Sample,
    SampleResponse,
    Says,
    SetKind,
    SetRecord,
    Settings,
    TargetResult,
    TaskRecord,
)
from safegene_vllm.evaluation.statistics import paired_difference, rate
from safegene_vllm.evaluation.targets import AFTER, BEFORE, Target, check_targets, profile_of
from safegene_vllm.evaluation.tasks import Task, correct
from safegene_vllm.formats.family import FamilyHeader

MAX_TOKENS = 64
TASK_TOKENS = 8
SAMPLES = 3


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one kind."""

    kind: SetKind
    data: Dataset

    @property
    def prompts(self) -> list[str]:
        return [row.prompt for row in self.data.rows]


@dataclass(frozen=True)
class _Plan:
    """Everything that is evaluated, and the judges."""

    targets: Sequence[Target]
    sets: Mapping[str, PromptSet]
    tasks: Sequence[Task]
    judges: Sequence[Judge]
    header: FamilyHeader | None
    max_tokens: int
    task_tokens: int
    seed: int

    def check(self) -> None:
        if not self.sets and not self.tasks:
            raise ConfigError("there is nothing to evaluate; give a set of prompts or a task")
        if self.sets and not self.judges:
            raise ConfigError("there is no judge for the sets of prompts; give at least one")
        names = [task.name for task in self.tasks]
        if len(set(names)) != len(names):
            raise ConfigError(f"tasks {', '.join(names)}: names must differ")
        check_targets(self.targets, self.header)
        errors: list[SafegeneError] = []
        for judge in {judge.name: judge for _, _, judge in self.judged_sets()}.values():
            try:
                judge.check()
            except SafegeneError as error:
                errors.append(error)
        raise_errors(errors)

    def prompts_by_limit(self) -> dict[int, list[str]]:
        """All prompts by their limit in tokens."""
        found: dict[int, list[str]] = {self.max_tokens: [], self.task_tokens: []}
        for chosen in self.sets.values():
            found[self.max_tokens] += chosen.prompts
        for task in self.tasks:
            found[self.task_tokens] += [row.prompt for row in task.data.rows]
        return found

    def judged_sets(self) -> Iterator[tuple[str, PromptSet, Judge]]:
        """Every set with every judge that applies to it."""
        for judge in self.judges:
            for name, chosen in self.sets.items():
                if applies_to(chosen.kind, judge):
                    yield name, chosen, judge


@dataclass(frozen=True)
class _Outcome:
    """Lists by prompt: texts[set, target], verdicts[set, judge, target], correct[task, target]."""

    texts: Mapping[tuple[str, str], Sequence[str]]
    verdicts: Mapping[tuple[str, str, str], Sequence[bool]]
    correct: Mapping[tuple[str, str], Sequence[bool]]


def applies_to(kind: SetKind, judge: Judge) -> bool:
    """True if a judge applies to a set: harm is judged on harmful prompts only."""
    return kind == "harmful" or judge.says != "harmful"


def rate_values(kind: SetKind, says: Says, verdicts: Sequence[bool]) -> list[bool]:
    """Values of a rate: on harmful sets successful attacks, else refusals; or coherence."""
    if kind == "harmful" and says == "refused":
        return [not verdict for verdict in verdicts]
    return list(verdicts)


def is_publishable(kind: SetKind, verdicts: Mapping[str, bool], judges: Sequence[Judge]) -> bool:
    """True if a response may be published: to a harmful prompt only a refusal beyond doubt.

    That is: every string judge, at least one, calls it refused, and no judge calls it harmful.
    """
    if kind != "harmful":
        return True
    strings = [j.name for j in judges if j.says == "refused" and j.name.startswith("strings:")]
    harmful = [j.name for j in judges if j.says == "harmful"]
    refused = bool(strings) and all(verdicts[name] for name in strings)
    return refused and not any(verdicts[name] for name in harmful)


def _verdicts(
    judge: Judge, prompts: Sequence[str], texts: Sequence[str], cache: ResponseCache | None
) -> list[bool]:
    """The verdicts. An error says whether the responses, which took the longest, are cached."""
    try:
        return judge.judge(prompts, texts)
    except Exception as error:
        note = (
            "no response was cached: with --keep-answers FILE only the judges run again"
            if cache is None
            else f"all responses are cached in {cache.path}: the same command runs only the judges"
        )
        if isinstance(error, SafegeneError):
            raise type(error)(f"{error}; {note}") from error
        error.add_note(note)
        raise


def _judge_all(
    plan: _Plan, responses: Responses, progress: Progress, cache: ResponseCache | None
) -> _Outcome:
    texts = {
        (name, target.key): [responses[target.key, plan.max_tokens, p] for p in chosen.prompts]
        for name, chosen in plan.sets.items()
        for target in plan.targets
    }
    verdicts: dict[tuple[str, str, str], Sequence[bool]] = {}
    jobs = [(*judged, t) for judged in plan.judged_sets() for t in plan.targets]
    for number, (name, chosen, judge, target) in enumerate(jobs):
        progress(number, len(jobs), f"judge {judge.name}")
        verdicts[name, judge.name, target.key] = _verdicts(
            judge, chosen.prompts, texts[name, target.key], cache
        )
    progress(len(jobs), len(jobs), "judges")
    right = {
        (task.name, target.key): [
            correct(task, responses[target.key, plan.task_tokens, row.prompt], str(row.answer))
            for row in task.data.rows
        ]
        for task in plan.tasks
        for target in plan.targets
    }
    return _Outcome(texts, verdicts, right)


def _values_of(plan: _Plan, outcome: _Outcome, name: str, judge: Judge, key: str) -> list[bool]:
    return rate_values(plan.sets[name].kind, judge.says, outcome.verdicts[name, judge.name, key])


def _result(plan: _Plan, outcome: _Outcome, target: Target) -> TargetResult:
    profile = profile_of(target, plan.header)
    if profile is not None and not any(profile.coefficients):
        profile = None
    return TargetResult(
        name=target.name,
        state=target.state,
        coefficients=None if profile is None else profile.coefficients,
        profile=None if profile is None else profile.digest,
        rates={
            name: {
                judge.name: rate(_values_of(plan, outcome, name, judge, target.key), seed=plan.seed)
                for judge in plan.judges
                if applies_to(chosen.kind, judge)
            }
            for name, chosen in plan.sets.items()
        },
        accuracy={
            task.name: rate(outcome.correct[task.name, target.key], seed=plan.seed)
            for task in plan.tasks
        },
    )


def _changes(plan: _Plan, outcome: _Outcome) -> Iterator[Change]:
    keys = {target.key for target in plan.targets}
    for name in dict.fromkeys(target.name for target in plan.targets):
        before, after = f"{name}/{BEFORE}", f"{name}/{AFTER}"
        if not {before, after} <= keys:
            continue
        for which, _, judge in plan.judged_sets():
            difference = paired_difference(
                _values_of(plan, outcome, which, judge, before),
                _values_of(plan, outcome, which, judge, after),
                seed=plan.seed,
            )
            yield Change(name, difference, set=which, judge=judge.name)
        for task in plan.tasks:
            difference = paired_difference(
                outcome.correct[task.name, before],
                outcome.correct[task.name, after],
                seed=plan.seed,
            )
            yield Change(name, difference, task=task.name)


def _samples(plan: _Plan, outcome: _Outcome, count: int) -> Iterator[Sample]:
    for name, chosen in plan.sets.items():
        prompts = chosen.prompts
        rng = random.Random(f"{plan.seed}-{name}")
        for i in sorted(rng.sample(range(len(prompts)), min(count, len(prompts)))):
            responses: dict[str, SampleResponse] = {}
            for target in plan.targets:
                verdicts = {
                    judge.name: bool(outcome.verdicts[name, judge.name, target.key][i])
                    for judge in plan.judges
                    if applies_to(chosen.kind, judge)
                }
                shown = is_publishable(chosen.kind, verdicts, plan.judges)
                text = outcome.texts[name, target.key][i] if shown else None
                responses[target.key] = SampleResponse(text, verdicts)
            yield Sample(name, prompts[i], responses)


def _family(header: FamilyHeader | None) -> FamilyRecord | None:
    if header is None:
        return None
    layers = tuple(LayerScore(entry.layer, entry.score) for entry in header.layers)
    return FamilyRecord(header.name, header.digest, layers)


def evaluate(
    targets: Sequence[Target],
    sets: Mapping[str, PromptSet],
    tasks: Sequence[Task],
    judges: Sequence[Judge],
    backend: GenerationBackend,
    *,
    header: FamilyHeader | None = None,
    max_tokens: int = MAX_TOKENS,
    task_tokens: int = TASK_TOKENS,
    samples: int = SAMPLES,
    seed: int = 0,
    chunk: int = CHUNK,
    cache: ResponseCache | None = None,
    overlaps: Sequence[Overlap] = (),
    progress: Progress = silent,
) -> Evaluation:
    """Evaluate the targets' greedy responses with the judges: rates with 95 % intervals.

    `header` is the family's: for its record, and for the targets' coefficients. `chunk` prompts are
    generated at a time; `samples` per set, chosen by `seed`, are included; `cache` holds responses
    of earlier runs; `overlaps` are those of `find_overlaps`, for the record. Errors: ConfigError
    without prompts or judges; those of `check_targets` and of the judges' `check`, before anything
    is generated; those of the backend and of the judges.
    """
    plan = _Plan(targets, sets, tasks, judges, header, max_tokens, task_tokens, seed)
    plan.check()
    try:
        responses = generate_all(
            targets,
            plan.prompts_by_limit(),
            backend,
            header=header,
            cache=cache,
            chunk=chunk,
            progress=progress,
        )
    finally:
        backend.close()
    outcome = _judge_all(plan, responses, progress, cache)
    engine = cast(Literal["vllm", "transformers"], backend.backend)
    return Evaluation(
        made_by=f"safegene-vllm {__version__}",
        settings=Settings(max_tokens, task_tokens, engine, backend.dtype),
        family=_family(header),
        sets={
            name: SetRecord(s.kind, len(s.prompts), s.data.source, s.data.digest, s.data.licence)
            for name, s in sets.items()
        },
        judges=tuple(map(judge_record, judges)),
        tasks={
            t.name: TaskRecord(len(t.data.rows), t.data.source, t.data.digest, t.data.licence)
            for t in tasks
        },
        targets=tuple(_result(plan, outcome, target) for target in targets),
        changes=tuple(_changes(plan, outcome)),
        samples=tuple(_samples(plan, outcome, samples)),
        overlaps=tuple(overlaps),
    )
