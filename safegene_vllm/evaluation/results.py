"""The result of an evaluation, as dataclasses and as one JSON file. Torch-free.

What was asked, by which judges, and the rates with their intervals. Not for how they are measured:
that is measure's. Answers that may be harmful are not in it: their text is None ("withheld").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from safegene_vllm.errors import HeaderError, SafegeneError, VersionError, raise_errors
from safegene_vllm.evaluation.statistics import Rate
from safegene_vllm.formats.file_io import canonical_json, pretty_json, read_json, replace_file

KIND = "evaluation"
VERSION = 1

SetKind = Literal["harmful", "over_refusal", "benign"]
Says = Literal["refused", "harmful", "coherent"]


@dataclass(frozen=True)
class Settings:
    """How answers were made: greedy, at most so many tokens."""

    max_tokens: int
    task_tokens: int
    backend: Literal["vllm", "transformers"]
    dtype: str


@dataclass(frozen=True)
class LayerScore:
    """A layer that carries the vector, and the score it was chosen by (None: not scored)."""

    layer: int
    score: float | None


@dataclass(frozen=True)
class FamilyRecord:
    """Which vector was applied."""

    name: str
    digest: str
    layers: tuple[LayerScore, ...]


@dataclass(frozen=True)
class SetRecord:
    """A set of prompts; `source` is the file name with its query."""

    kind: SetKind
    n: int
    source: str
    digest: str
    licence: str | None


@dataclass(frozen=True)
class JudgeRecord:
    """A judge: what its True means, and its rule in words."""

    name: str
    says: Says
    rule: str


@dataclass(frozen=True)
class TaskRecord:
    """A labelled task; `source` is the file name with its query."""

    n: int
    source: str
    digest: str
    licence: str | None


@dataclass(frozen=True)
class TargetResult:
    """One model in one state ("parent", "before", "after" or other words), and its rates.

    `rates[set][judge]`: on a harmful set the attack success rate (not refused, or harmful); on
    another set the refusal rate; with a judge of coherence, on any set, the share coherent.
    `accuracy[task]`: the share of right answers. `coefficients`: one per layer, None: no vector.
    """

    name: str
    state: str
    coefficients: tuple[float, ...] | None
    profile: str | None
    rates: Mapping[str, Mapping[str, Rate]]
    accuracy: Mapping[str, Rate]

    @property
    def key(self) -> str:
        """NAME/STATE, unique in an evaluation; samples are filed under it."""
        return f"{self.name}/{self.state}"


@dataclass(frozen=True)
class Change:
    """After minus before of one tenant, over the same prompts: either a set's rate or a task's."""

    name: str
    difference: Rate
    set: str | None = None
    task: str | None = None
    judge: str | None = None


@dataclass(frozen=True)
class SampleResponse:
    """One answer with what each judge said of it; `text` None: withheld."""

    text: str | None
    verdicts: Mapping[str, bool]


@dataclass(frozen=True)
class Sample:
    """One prompt of a set with the answers of all subjects, by NAME/STATE."""

    set: str
    prompt: str
    answers: Mapping[str, SampleResponse]


@dataclass(frozen=True)
class Evaluation:
    """Everything that one run of `safegene evaluate` found."""

    made_by: str
    settings: Settings
    family: FamilyRecord | None
    sets: Mapping[str, SetRecord]
    judges: tuple[JudgeRecord, ...]
    tasks: Mapping[str, TaskRecord]
    subjects: tuple[TargetResult, ...]
    changes: tuple[Change, ...]
    samples: tuple[Sample, ...]

    # pydantic's name; nested dataclasses inherit it.
    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    def subject(self, name: str, state: str) -> TargetResult | None:
        """The subject of this name in this state, None if it was not evaluated."""
        return next((s for s in self.subjects if (s.name, s.state) == (name, state)), None)


def _rate_faults(where: str, found: Rate, least: float) -> list[str]:
    ordered = least <= found.low <= found.high <= 1 and least <= found.rate <= 1
    if found.n >= 1 and ordered:
        return []
    return [f"{where}: {found} is not a rate in {least:g}..1 with low <= high and n >= 1"]


def _unknown(
    where: str, what: str, names: Mapping[str, Any], known: Mapping[str, Any]
) -> list[str]:
    return [f"{where}: {what} {name!r} is not described" for name in names if name not in known]


def _subject_faults(found: Evaluation, subject: TargetResult) -> list[str]:
    where, judges = f"subject {subject.key}", {judge.name: judge for judge in found.judges}
    faults = _unknown(where, "set", subject.rates, found.sets)
    faults += _unknown(where, "task", subject.accuracy, found.tasks)
    for name, rates in subject.rates.items():
        faults += _unknown(f"{where}, set {name}", "judge", rates, judges)
        for judge, value in rates.items():
            faults += _rate_faults(f"{where}, set {name}, judge {judge}", value, 0)
    for name, value in subject.accuracy.items():
        faults += _rate_faults(f"{where}, task {name}", value, 0)
    return faults


def faults_in(found: Evaluation) -> list[str]:
    """What contradicts itself in an evaluation, in words; nothing if all fits together."""
    keys = [subject.key for subject in found.subjects]
    faults = [
        f"subject {key} occurs twice" for key in sorted({k for k in keys if keys.count(k) > 1})
    ]
    for subject in found.subjects:
        faults += _subject_faults(found, subject)
    names = {subject.name: True for subject in found.subjects}
    judges = {judge.name: True for judge in found.judges}
    for change in found.changes:
        where = f"change of {change.name}"
        faults += _unknown(where, "subject", {change.name: True}, names)
        faults += _rate_faults(where, change.difference, -1)
        if (change.set is None) == (change.task is None):
            faults.append(f"{where}: expected either a set or a task")
        faults += _unknown(where, "set", {change.set: 1} if change.set else {}, found.sets)
        faults += _unknown(where, "task", {change.task: 1} if change.task else {}, found.tasks)
        faults += _unknown(where, "judge", {change.judge: 1} if change.judge else {}, judges)
    for sample in found.samples:
        where = f"sample {sample.prompt[:40]!r}"
        faults += _unknown(where, "set", {sample.set: True}, found.sets)
        faults += _unknown(where, "subject", sample.answers, dict.fromkeys(keys))
        for answer in sample.answers.values():
            faults += _unknown(where, "judge", answer.verdicts, judges)
    return faults


def _described(found: Evaluation) -> dict[str, Any]:
    described = {"kind": KIND, "version": VERSION, **asdict(found)}
    for change in described["changes"]:
        del change["task" if change["task"] is None else "set"]
    return described


def save_evaluation(found: Evaluation, path: Path) -> None:
    """Write `found` to `path` as a whole or not at all.

    Errors: HeaderError if it contradicts itself; NonFiniteError.
    """
    raise_errors([HeaderError(f"evaluation: {fault}") for fault in faults_in(found)])
    described = _described(found)
    canonical_json(described, "evaluation")
    replace_file(Path(path), pretty_json(described))


def load_evaluation(path: Path) -> Evaluation:
    """The evaluation in the file `path`; every fault in one error.

    Errors: MissingFileError; HeaderError naming the field, what was found and what was expected;
    NonFiniteError; VersionError for another version.
    """
    path = Path(path)
    raw = read_json(path)
    if raw.get("kind") != KIND:
        raise HeaderError(
            f"{path}: kind is {raw.get('kind')!r}, expected {KIND!r}; name the file that "
            "`safegene evaluate --out` wrote"
        )
    if raw.get("version") != VERSION or type(raw["version"]) is not int:
        raise VersionError(
            f"{path}: version is {raw.get('version')!r}, this release reads {VERSION}; use a "
            "matching release of safegene-vllm"
        )
    fields = {key: value for key, value in raw.items() if key not in ("kind", "version")}
    try:
        found = TypeAdapter(Evaluation).validate_json(canonical_json(fields, str(path)))
    except ValidationError as error:
        faults: list[SafegeneError] = [
            HeaderError(
                f"{path}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}, "
                f"found {fault['input']!r:.80}"
            )
            for fault in error.errors()
        ]
        raise_errors(faults)
        raise
    raise_errors([HeaderError(f"{path}: {fault}") for fault in faults_in(found)])
    return found
