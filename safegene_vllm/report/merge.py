"""Several evaluations as one, so that one page can show them side by side.

Only what was measured alike is put together: a set, a task or a judge of one name must be the same
in all files. Says what it left out. Not for how anything looks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TypeVar

from safegene_vllm.errors import ConfigError, SafegeneError, raise_errors
from safegene_vllm.evaluation.results import (
    Change,
    Evaluation,
    FamilyRecord,
    JudgeRecord,
    Sample,
    SetRecord,
    TargetResult,
    TaskRecord,
)
from safegene_vllm.evaluation.statistics import Rate

T = TypeVar("T", SetRecord, TaskRecord, JudgeRecord, FamilyRecord)

SHARED = ("parent", "before")
"""States that several evaluations may measure anew; the first one's numbers are shown."""


@dataclass(frozen=True)
class MergedEvaluation:
    """What all evaluations found; `family_of` goes from NAME/STATE to the digest of its family."""

    runs: Mapping[str, Evaluation]
    sets: Mapping[str, SetRecord]
    tasks: Mapping[str, TaskRecord]
    judges: Mapping[str, JudgeRecord]
    families: Mapping[str, FamilyRecord]
    subjects: Mapping[str, TargetResult]
    family_of: Mapping[str, str]
    changes: tuple[Change, ...]
    samples: tuple[Sample, ...]
    notes: tuple[str, ...]

    @property
    def parent(self) -> TargetResult | None:
        """The first subject whose state is "parent"."""
        return next((s for s in self.subjects.values() if s.state == "parent"), None)

    @property
    def tenants(self) -> tuple[str, ...]:
        """Names with any state but "parent", in order."""
        names = (s.name for s in self.subjects.values() if s.state != "parent")
        return tuple(dict.fromkeys(names))

    def of(self, tenant: str) -> dict[str, TargetResult]:
        """The tenant's states: before, after, then the others in order; no parent."""
        found = {
            s.state: s for s in self.subjects.values() if s.name == tenant and s.state != "parent"
        }
        first = [state for state in ("before", "after") if state in found]
        return {state: found[state] for state in (*first, *found)}

    def change(
        self, tenant: str, *, set: str | None = None, task: str | None = None, judge: str | None
    ) -> Rate | None:
        """After minus before of a tenant's rate or accuracy, None if it was not computed."""
        wanted = (tenant, set, task, judge)
        for change in self.changes:
            if (change.name, change.set, change.task, change.judge) == wanted:
                return change.difference
        return None


class _Faults:
    """Collects contradictions and remarks while evaluations are put together."""

    def __init__(self) -> None:
        self.found: list[SafegeneError] = []
        self.notes: list[str] = []

    def put(self, where: str, into: dict[str, T], new: Mapping[str, T], what: str) -> None:
        """Add `new` to `into`; what is there already must be the same but for its file's name."""
        for name, value in new.items():
            old, fresh = asdict(into.setdefault(name, value)), asdict(value)
            differs = [key for key in old if key != "source" and old[key] != fresh[key]]
            if differs:
                told = "; ".join(f"{key} is {fresh[key]!r}, was {old[key]!r}" for key in differs)
                self.found.append(
                    ConfigError(
                        f"{where}: {what} {name!r} differs from an earlier evaluation's: {told}. "
                        "One page compares like with like: name them apart, or write two reports"
                    )
                )


def _gap(one: Mapping[str, Rate], other: Mapping[str, Rate]) -> float:
    """The largest difference of the rates that both have."""
    return max((abs(one[name].rate - other[name].rate) for name in one if name in other), default=0)


def _all_rates(subject: TargetResult) -> dict[str, Rate]:
    rates = {f"{s} {j}": r for s, by_judge in subject.rates.items() for j, r in by_judge.items()}
    return rates | {f"task {name}": value for name, value in subject.accuracy.items()}


def _merged(where: str, old: TargetResult, new: TargetResult, faults: _Faults) -> TargetResult:
    """`old`, and of `new` what `old` has not; differing results are noted or refused."""
    known, measured = _all_rates(old), _all_rates(new)
    differs = any(known[name] != measured[name] for name in known if name in measured)
    same = (old.coefficients, old.profile) == (new.coefficients, new.profile)
    if new.state in SHARED and differs:
        faults.notes.append(
            f"{new.key} was measured more than once; the first numbers are shown. {where} "
            f"differs by up to {100 * _gap(known, measured):.1f} points."
        )
    elif new.state not in SHARED and (differs or not same):
        what = "other results" if same else "other coefficients"
        faults.found.append(
            ConfigError(
                f"{where}: {new.key} has {what} than in an earlier evaluation; give the state a "
                "name of its own, or write a report for each"
            )
        )
    rates = {
        name: {**new.rates.get(name, {}), **old.rates.get(name, {})}
        for name in dict.fromkeys((*old.rates, *new.rates))
    }
    return replace(old, rates=rates, accuracy={**new.accuracy, **old.accuracy})


def _samples(found: Sequence[Sample]) -> tuple[Sample, ...]:
    """One sample per set and prompt, with the answers of all."""
    merged: dict[tuple[str, str], Sample] = {}
    for sample in found:
        key = (sample.set, sample.prompt)
        if key in merged:
            answers = {**sample.answers, **merged[key].answers}
            merged[key] = replace(merged[key], answers=answers)
        else:
            merged[key] = sample
    return tuple(merged.values())


def merge_evaluations(runs: Mapping[str, Evaluation]) -> MergedEvaluation:
    """The evaluations in `runs`, by the names that people know them by, as one.

    Errors: ConfigError without any, or if two of them measured different things under one name;
    all contradictions in one message.
    """
    if not runs:
        raise ConfigError("no evaluation given; name at least one file of `safegene evaluate`")
    faults = _Faults()
    sets: dict[str, SetRecord] = {}
    tasks: dict[str, TaskRecord] = {}
    judges: dict[str, JudgeRecord] = {}
    families: dict[str, FamilyRecord] = {}
    subjects: dict[str, TargetResult] = {}
    family_of: dict[str, str] = {}
    changes: dict[tuple[str | None, ...], Change] = {}
    for name, run in runs.items():
        faults.put(name, sets, run.sets, "set")
        faults.put(name, tasks, run.tasks, "task")
        faults.put(name, judges, {judge.name: judge for judge in run.judges}, "judge")
        if run.family is not None:
            faults.put(name, families, {run.family.digest: run.family}, "family")
        for subject in run.subjects:
            old = subjects.get(subject.key)
            subjects[subject.key] = subject if old is None else _merged(name, old, subject, faults)
            if run.family is not None:
                family_of.setdefault(subject.key, run.family.digest)
        for change in run.changes:
            changes.setdefault((change.name, change.set, change.task, change.judge), change)
    if len({run.settings for run in runs.values()}) > 1:
        faults.notes.append("The evaluations were run with different settings; see the last part.")
    raise_errors(faults.found)
    return MergedEvaluation(
        runs=dict(runs),
        sets=sets,
        tasks=tasks,
        judges=judges,
        families=families,
        subjects=subjects,
        family_of=family_of,
        changes=tuple(changes.values()),
        samples=_samples([sample for run in runs.values() for sample in run.samples]),
        notes=tuple(faults.notes),
    )
