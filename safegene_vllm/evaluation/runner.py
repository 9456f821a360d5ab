"""An evaluation from its parts: subjects are asked, judges judge, rates are counted.

Judges are checked, then all answers, then the answering model is put away, then all judgements.
Answers stay in memory; what leaves is rates and a few samples, harmful ones withheld.
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
from safegene_vllm.evaluation.generation import CHUNK, Answers, Progress, generate_all, silent
from safegene_vllm.evaluation.judges import Judge, record_of
from safegene_vllm.evaluation.response_cache import ResponseCache
from safegene_vllm.evaluation.results import (
    Change,
    Evaluation,
    FamilyRecord,
    LayerScore,
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
    """Prompts and what they are for."""

    kind: SetKind
    data: Dataset

    @property
    def prompts(self) -> list[str]:
        return [row.prompt for row in self.data.rows]


@dataclass(frozen=True)
class _Plan:
    """What is evaluated, and by whom."""

    subjects: Sequence[Target]
    sets: Mapping[str, PromptSet]
    tasks: Sequence[Task]
    judges: Sequence[Judge]
    header: FamilyHeader | None
    max_tokens: int
    task_tokens: int
    seed: int

    def check(self) -> None:
        if not self.sets and not self.tasks:
            raise ConfigError("there is nothing to ask; give a set of prompts or a task")
        if self.sets and not self.judges:
            raise ConfigError("there is no judge for the sets of prompts; give at least one")
        names = [task.name for task in self.tasks]
        if len(set(names)) != len(names):
            raise ConfigError(f"tasks {', '.join(names)}: names must differ")
        check_targets(self.subjects, self.header)
        faults: list[SafegeneError] = []
        for judge in {judge.name: judge for _, _, judge in self.questions()}.values():
            try:
                judge.check()
            except SafegeneError as error:
                faults.append(error)
        raise_errors(faults)

    def wanted(self) -> dict[int, list[str]]:
        """All prompts by their limit in tokens."""
        found: dict[int, list[str]] = {self.max_tokens: [], self.task_tokens: []}
        for chosen in self.sets.values():
            found[self.max_tokens] += chosen.prompts
        for task in self.tasks:
            found[self.task_tokens] += [row.prompt for row in task.data.rows]
        return found

    def questions(self) -> Iterator[tuple[str, PromptSet, Judge]]:
        """Every set with every judge that is asked about it."""
        for judge in self.judges:
            for name, chosen in self.sets.items():
                if is_asked(chosen.kind, judge):
                    yield name, chosen, judge


@dataclass(frozen=True)
class _Found:
    """texts[set, subject], verdicts[set, judge, subject], right[task, subject]: lists by prompt."""

    texts: Mapping[tuple[str, str], Sequence[str]]
    verdicts: Mapping[tuple[str, str, str], Sequence[bool]]
    right: Mapping[tuple[str, str], Sequence[bool]]


def is_asked(kind: SetKind, judge: Judge) -> bool:
    """Whether a judge is asked about a set: harm is looked for only where harm was asked for."""
    return kind == "harmful" or judge.says != "harmful"


def counted(kind: SetKind, says: Says, verdicts: Sequence[bool]) -> list[bool]:
    """What a rate counts: on harmful sets attacks that succeed, else refusals; or coherence."""
    if kind == "harmful" and says == "refused":
        return [not verdict for verdict in verdicts]
    return list(verdicts)


def may_be_shown(kind: SetKind, verdicts: Mapping[str, bool], judges: Sequence[Judge]) -> bool:
    """Whether an answer may be written down: to a harmful prompt only a refusal beyond doubt.

    That is: every string judge, at least one, calls it refused, and no judge calls it harmful.
    """
    if kind != "harmful":
        return True
    strings = [j.name for j in judges if j.says == "refused" and j.name.startswith("strings:")]
    harmful = [j.name for j in judges if j.says == "harmful"]
    refused = bool(strings) and all(verdicts[name] for name in strings)
    return refused and not any(verdicts[name] for name in harmful)


def _said(
    judge: Judge, prompts: Sequence[str], texts: Sequence[str], kept: ResponseCache | None
) -> list[bool]:
    """The verdicts. An error tells what becomes of the answers, which took the longest to get."""
    try:
        return judge.judge(prompts, texts)
    except Exception as error:
        what = (
            "no answer was kept: give --keep-answers FILE, and only the judges are asked again"
            if kept is None
            else f"all answers are kept in {kept.path}: the same command asks the judges again"
        )
        if isinstance(error, SafegeneError):
            raise type(error)(f"{error}; {what}") from error
        error.add_note(what)
        raise


def _judged(
    plan: _Plan, answers: Answers, progress: Progress, kept: ResponseCache | None
) -> _Found:
    texts = {
        (name, subject.key): [answers[subject.key, plan.max_tokens, p] for p in chosen.prompts]
        for name, chosen in plan.sets.items()
        for subject in plan.subjects
    }
    verdicts: dict[tuple[str, str, str], Sequence[bool]] = {}
    jobs = [(*question, s) for question in plan.questions() for s in plan.subjects]
    for number, (name, chosen, judge, subject) in enumerate(jobs):
        progress(number, len(jobs), f"judge {judge.name}")
        said = _said(judge, chosen.prompts, texts[name, subject.key], kept)
        verdicts[name, judge.name, subject.key] = said
    progress(len(jobs), len(jobs), "judges")
    right = {
        (task.name, subject.key): [
            correct(task, answers[subject.key, plan.task_tokens, row.prompt], str(row.answer))
            for row in task.data.rows
        ]
        for task in plan.tasks
        for subject in plan.subjects
    }
    return _Found(texts, verdicts, right)


def _counted_of(plan: _Plan, found: _Found, name: str, judge: Judge, key: str) -> list[bool]:
    return counted(plan.sets[name].kind, judge.says, found.verdicts[name, judge.name, key])


def _result(plan: _Plan, found: _Found, subject: Target) -> TargetResult:
    profile = profile_of(subject, plan.header)
    if profile is not None and not any(profile.coefficients):
        profile = None
    return TargetResult(
        name=subject.name,
        state=subject.state,
        coefficients=None if profile is None else profile.coefficients,
        profile=None if profile is None else profile.digest,
        rates={
            name: {
                judge.name: rate(_counted_of(plan, found, name, judge, subject.key), seed=plan.seed)
                for judge in plan.judges
                if is_asked(chosen.kind, judge)
            }
            for name, chosen in plan.sets.items()
        },
        accuracy={
            task.name: rate(found.right[task.name, subject.key], seed=plan.seed)
            for task in plan.tasks
        },
    )


def _changes(plan: _Plan, found: _Found) -> Iterator[Change]:
    keys = {subject.key for subject in plan.subjects}
    for name in dict.fromkeys(subject.name for subject in plan.subjects):
        before, after = f"{name}/{BEFORE}", f"{name}/{AFTER}"
        if not {before, after} <= keys:
            continue
        for which, _, judge in plan.questions():
            difference = paired_difference(
                _counted_of(plan, found, which, judge, before),
                _counted_of(plan, found, which, judge, after),
                seed=plan.seed,
            )
            yield Change(name, difference, set=which, judge=judge.name)
        for task in plan.tasks:
            difference = paired_difference(
                found.right[task.name, before], found.right[task.name, after], seed=plan.seed
            )
            yield Change(name, difference, task=task.name)


def _samples(plan: _Plan, found: _Found, count: int) -> Iterator[Sample]:
    for name, chosen in plan.sets.items():
        prompts = chosen.prompts
        rng = random.Random(f"{plan.seed}-{name}")
        for i in sorted(rng.sample(range(len(prompts)), min(count, len(prompts)))):
            answers: dict[str, SampleResponse] = {}
            for subject in plan.subjects:
                verdicts = {
                    judge.name: bool(found.verdicts[name, judge.name, subject.key][i])
                    for judge in plan.judges
                    if is_asked(chosen.kind, judge)
                }
                shown = may_be_shown(chosen.kind, verdicts, plan.judges)
                text = found.texts[name, subject.key][i] if shown else None
                answers[subject.key] = SampleResponse(text, verdicts)
            yield Sample(name, prompts[i], answers)


def _family(header: FamilyHeader | None) -> FamilyRecord | None:
    if header is None:
        return None
    layers = tuple(LayerScore(entry.layer, entry.score) for entry in header.layers)
    return FamilyRecord(header.name, header.digest, layers)


def evaluate(
    subjects: Sequence[Target],
    sets: Mapping[str, PromptSet],
    tasks: Sequence[Task],
    judges: Sequence[Judge],
    answerer: GenerationBackend,
    *,
    header: FamilyHeader | None = None,
    max_tokens: int = MAX_TOKENS,
    task_tokens: int = TASK_TOKENS,
    samples: int = SAMPLES,
    seed: int = 0,
    chunk: int = CHUNK,
    kept: ResponseCache | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """What the judges find in the subjects' greedy answers, with 95 % intervals.

    `header` is the family's: for its record, and for the subjects' coefficients. `chunk` prompts
    are asked at a time; `samples` per set are written down, chosen by `seed`; `kept` holds answers
    from before. Errors: ConfigError if there is nothing to ask or nobody to judge; those of
    `check_targets` and of the judges' `check`, before anything is asked; those of the answerer and
    of the judges.
    """
    plan = _Plan(subjects, sets, tasks, judges, header, max_tokens, task_tokens, seed)
    plan.check()
    try:
        answers = generate_all(
            subjects,
            plan.wanted(),
            answerer,
            header=header,
            kept=kept,
            chunk=chunk,
            progress=progress,
        )
    finally:
        answerer.close()
    found = _judged(plan, answers, progress, kept)
    backend = cast(Literal["vllm", "transformers"], answerer.backend)
    return Evaluation(
        made_by=f"safegene-vllm {__version__}",
        settings=Settings(max_tokens, task_tokens, backend, answerer.dtype),
        family=_family(header),
        sets={
            name: SetRecord(s.kind, len(s.prompts), s.data.source, s.data.digest, s.data.licence)
            for name, s in sets.items()
        },
        judges=tuple(map(record_of, judges)),
        tasks={
            t.name: TaskRecord(len(t.data.rows), t.data.source, t.data.digest, t.data.licence)
            for t in tasks
        },
        subjects=tuple(_result(plan, found, subject) for subject in subjects),
        changes=tuple(_changes(plan, found)),
        samples=tuple(_samples(plan, found, samples)),
    )
