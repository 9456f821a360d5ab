"""Several evaluations merged into one, so that one page can compare them.

A set, a task or a judge of one name must be the same in all of them. What is left out is noted.
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
"""States that several evaluations may share; the first one's numbers are shown."""


@dataclass(frozen=True)
class MergedEvaluation:
    """Results of all evaluations; `family_of` maps NAME/STATE to the digest of its family."""

    runs: Mapping[str, Evaluation]
    sets: Mapping[str, SetRecord]
    tasks: Mapping[str, TaskRecord]
    judges: Mapping[str, JudgeRecord]
    families: Mapping[str, FamilyRecord]
    targets: Mapping[str, TargetResult]
    family_of: Mapping[str, str]
    changes: tuple[Change, ...]
    samples: tuple[Sample, ...]
    notes: tuple[str, ...]

    @property
    def parent(self) -> TargetResult | None:
        """The first target whose state is "parent"."""
        return next((s for s in self.targets.values() if s.state == "parent"), None)

    @property
    def tenants(self) -> tuple[str, ...]:
        """Names with any state but "parent", in order."""
        names = (s.name for s in self.targets.values() if s.state != "parent")
        return tuple(dict.fromkeys(names))

    def states_of(self, tenant: str) -> dict[str, TargetResult]:
        """The tenant's results by state: before, after, then the others in order; no parent."""
        found = {
            s.state: s for s in self.targets.values() if s.name == tenant and s.state != "parent"
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


class _Problems:
    """Contradictions and notes collected during a merge."""

    def __init__(self) -> None:
        self.errors: list[SafegeneError] = []
        self.notes: list[str] = []

    def add(self, where: str, into: dict[str, T], new: Mapping[str, T], what: str) -> None:
        """Add `new` to `into`; an earlier record must be equal except for its source."""
        for name, value in new.items():
            old, fresh = asdict(into.setdefault(name, value)), asdict(value)
            differs = [key for key in old if key != "source" and old[key] != fresh[key]]
            if differs:
                changes = "; ".join(f"{key} is {fresh[key]!r}, was {old[key]!r}" for key in differs)
                self.errors.append(
                    ConfigError(
                        f"{where}: {what} {name!r} differs from an earlier evaluation's: "
                        f"{changes}. Give them different names, or write two reports"
                    )
                )


def _gap(one: Mapping[str, Rate], other: Mapping[str, Rate]) -> float:
    """The largest difference of the rates that both have."""
    return max((abs(one[name].rate - other[name].rate) for name in one if name in other), default=0)


def _all_rates(target: TargetResult) -> dict[str, Rate]:
    rates = {f"{s} {j}": r for s, by_judge in target.rates.items() for j, r in by_judge.items()}
    return rates | {f"task {name}": value for name, value in target.accuracy.items()}


def _merge_targets(
    where: str, old: TargetResult, new: TargetResult, problems: _Problems
) -> TargetResult:
    """`old` plus what only `new` has; differing results are noted or rejected."""
    known, measured = _all_rates(old), _all_rates(new)
    differs = any(known[name] != measured[name] for name in known if name in measured)
    same = (old.coefficients, old.profile) == (new.coefficients, new.profile)
    if new.state in SHARED and differs:
        problems.notes.append(
            f"{new.key} was measured more than once; the first numbers are shown. {where} "
            f"differs by up to {100 * _gap(known, measured):.1f} points."
        )
    elif new.state not in SHARED and (differs or not same):
        what = "other results" if same else "other coefficients"
        problems.errors.append(
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


def _merge_samples(samples: Sequence[Sample]) -> tuple[Sample, ...]:
    """One sample per set and prompt, with the responses of all targets."""
    merged: dict[tuple[str, str], Sample] = {}
    for sample in samples:
        key = (sample.set, sample.prompt)
        if key in merged:
            responses = {**sample.responses, **merged[key].responses}
            merged[key] = replace(merged[key], responses=responses)
        else:
            merged[key] = sample
    return tuple(merged.values())


def merge_evaluations(runs: Mapping[str, Evaluation]) -> MergedEvaluation:
    """The evaluations in `runs`, by their display names, as one.

    Errors: ConfigError without any, or if two of them measured different things under one name;
    all contradictions in one message.
    """
    if not runs:
        raise ConfigError("no evaluation given; name at least one file of `safegene evaluate`")
    problems = _Problems()
    sets: dict[str, SetRecord] = {}
    tasks: dict[str, TaskRecord] = {}
    judges: dict[str, JudgeRecord] = {}
    families: dict[str, FamilyRecord] = {}
    targets: dict[str, TargetResult] = {}
    family_of: dict[str, str] = {}
    changes: dict[tuple[str | None, ...], Change] = {}
    for name, run in runs.items():
        problems.add(name, sets, run.sets, "set")
        problems.add(name, tasks, run.tasks, "task")
        problems.add(name, judges, {judge.name: judge for judge in run.judges}, "judge")
        if run.family is not None:
            problems.add(name, families, {run.family.digest: run.family}, "family")
        for target in run.targets:
            old = targets.get(target.key)
            targets[target.key] = (
                target if old is None else _merge_targets(name, old, target, problems)
            )
            if run.family is not None:
                family_of.setdefault(target.key, run.family.digest)
        problems.notes += [
            overlap.warning for overlap in run.overlaps if overlap.warning not in problems.notes
        ]
        for change in run.changes:
            changes.setdefault((change.name, change.set, change.task, change.judge), change)
    if len({run.settings for run in runs.values()}) > 1:
        problems.notes.append("The evaluations were run with different settings; see Provenance.")
    raise_errors(problems.errors)
    return MergedEvaluation(
        runs=dict(runs),
        sets=sets,
        tasks=tasks,
        judges=judges,
        families=families,
        targets=targets,
        family_of=family_of,
        changes=tuple(changes.values()),
        samples=_merge_samples([sample for run in runs.values() for sample in run.samples]),
        notes=tuple(problems.notes),
    )
