"""Result of an evaluation: rates with their intervals, and one JSON file. Torch-free.

Responses that may be harmful are withheld: their text is None.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from safegene_vllm.errors import HeaderError, VersionError, raise_errors
from safegene_vllm.evaluation.statistics import Rate
from safegene_vllm.formats.file_io import canonical_json, pretty_json, read_json, replace_file

KIND = "evaluation"
VERSION = 1

SetKind = Literal["harmful", "over_refusal", "benign"]
Says = Literal["refused", "harmful", "coherent"]


@dataclass(frozen=True)
class Settings:
    """Greedy generation: limits in tokens, backend and dtype."""

    max_tokens: int
    task_tokens: int
    backend: Literal["vllm", "transformers"]
    dtype: str


@dataclass(frozen=True)
class LayerScore:
    """A layer that carries the vector, and its selection score (None: not scored)."""

    layer: int
    score: float | None


@dataclass(frozen=True)
class FamilyRecord:
    """The family whose vector was applied."""

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
class TaskRecord:
    """A labeled task; `source` is the file name with its query."""

    n: int
    source: str
    digest: str
    licence: str | None


@dataclass(frozen=True)
class JudgeRecord:
    """A judge: `says` is the meaning of a True verdict, `rule` how it decides."""

    name: str
    says: Says
    rule: str


@dataclass(frozen=True)
class TargetResult:
    """One model in one state ("parent", "before", "after" or other words), and its rates.

    `rates[set][judge]`: on a harmful set the attack success rate (not refused, or harmful); on
    another set the refusal rate; with a judge of coherence, on any set, the share coherent.
    `accuracy[task]`: the share of correct responses. `coefficients`: one per layer, None: no
    vector.
    """

    name: str
    state: str
    coefficients: tuple[float, ...] | None
    profile: str | None
    rates: Mapping[str, Mapping[str, Rate]]
    accuracy: Mapping[str, Rate]

    @property
    def key(self) -> str:
        """NAME/STATE, unique in an evaluation; samples refer to it."""
        return f"{self.name}/{self.state}"


@dataclass(frozen=True)
class Change:
    """After minus before of one tenant over the same prompts: a set's rate or a task's."""

    name: str
    difference: Rate
    set: str | None = None
    task: str | None = None
    judge: str | None = None


@dataclass(frozen=True)
class Overlap:
    """Prompts of a set or a task that were also used to make what is evaluated.

    `exact` of the `n` are the same after normalization, `near` are near-duplicates; `used_in` says
    where. `complete` False: only a sample of the used prompts was recorded, so there may be more.
    """

    name: str
    kind: Literal["set", "task"]
    used_in: str
    n: int
    exact: int
    near: int
    complete: bool

    @property
    def warning(self) -> str:
        """The overlap as a sentence, with row counts."""
        least = "" if self.complete else "at least "
        return (
            f"{self.name}: {least}{self.exact + self.near} of {self.n} prompts were also used in "
            f"{self.used_in} ({self.exact} the same, {self.near} near-duplicates), so its rates "
            "may be too good; evaluate on other prompts, or on `?part=held-out` of the same data."
        )


@dataclass(frozen=True)
class SampleResponse:
    """One response with the judges' verdicts; `text` None: withheld."""

    text: str | None
    verdicts: Mapping[str, bool]


@dataclass(frozen=True)
class Sample:
    """One prompt of a set with the responses of all targets, by NAME/STATE ("answers" in JSON)."""

    set: str
    prompt: str
    responses: Annotated[Mapping[str, SampleResponse], Field(alias="answers")]


@dataclass(frozen=True)
class Evaluation:
    """All results of one run of `safegene evaluate` (targets are "subjects" in JSON)."""

    made_by: str
    settings: Settings
    family: FamilyRecord | None
    sets: Mapping[str, SetRecord]
    judges: tuple[JudgeRecord, ...]
    tasks: Mapping[str, TaskRecord]
    targets: Annotated[tuple[TargetResult, ...], Field(alias="subjects")]
    changes: tuple[Change, ...]
    samples: tuple[Sample, ...]
    overlaps: tuple[Overlap, ...] = ()

    # pydantic's name; nested dataclasses inherit it.
    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    def target(self, name: str, state: str) -> TargetResult | None:
        """The target of this name in this state, None if it was not evaluated."""
        return next((t for t in self.targets if (t.name, t.state) == (name, state)), None)


_ADAPTER = TypeAdapter(Evaluation)


def _rate_problems(where: str, rate: Rate, low: float = 0) -> Iterator[str]:
    if not (rate.n >= 1 and low <= rate.low <= rate.high <= 1 and low <= rate.rate <= 1):
        yield f"{where}: {rate} is not a rate in {low:g}..1 with low <= high and n >= 1"


def _unknown(
    where: str, what: str, names: Iterable[str | None], known: Iterable[str]
) -> Iterator[str]:
    known = set(known)
    for name in names:
        if name is not None and name not in known:
            yield f"{where}: {what} {name!r} is not described"


def _target_problems(evaluation: Evaluation, target: TargetResult) -> Iterator[str]:
    where, judges = f"subject {target.key}", [judge.name for judge in evaluation.judges]
    yield from _unknown(where, "set", target.rates, evaluation.sets)
    yield from _unknown(where, "task", target.accuracy, evaluation.tasks)
    for name, rates in target.rates.items():
        yield from _unknown(f"{where}, set {name}", "judge", rates, judges)
        for judge, rate in rates.items():
            yield from _rate_problems(f"{where}, set {name}, judge {judge}", rate)
    for name, rate in target.accuracy.items():
        yield from _rate_problems(f"{where}, task {name}", rate)


def inconsistencies(evaluation: Evaluation) -> Iterator[str]:
    """Contradictions within an evaluation, as messages."""
    keys = [target.key for target in evaluation.targets]
    for key in sorted({key for key in keys if keys.count(key) > 1}):
        yield f"subject {key} occurs twice"
    for target in evaluation.targets:
        yield from _target_problems(evaluation, target)
    names = [target.name for target in evaluation.targets]
    judges = [judge.name for judge in evaluation.judges]
    for change in evaluation.changes:
        where = f"change of {change.name}"
        yield from _unknown(where, "subject", [change.name], names)
        yield from _rate_problems(where, change.difference, -1)
        if (change.set is None) == (change.task is None):
            yield f"{where}: expected either a set or a task"
        yield from _unknown(where, "set", [change.set], evaluation.sets)
        yield from _unknown(where, "task", [change.task], evaluation.tasks)
        yield from _unknown(where, "judge", [change.judge], judges)
    for overlap in evaluation.overlaps:
        where = f"overlap of {overlap.name}"
        known = evaluation.sets if overlap.kind == "set" else evaluation.tasks
        yield from _unknown(where, overlap.kind, [overlap.name], known)
        if (
            not 0 < overlap.exact + overlap.near <= overlap.n
            or min(overlap.exact, overlap.near) < 0
        ):
            yield f"{where}: {overlap.exact} + {overlap.near} are not 1 to {overlap.n} prompts"
    for sample in evaluation.samples:
        where = f"sample {sample.prompt[:40]!r}"
        yield from _unknown(where, "set", [sample.set], evaluation.sets)
        yield from _unknown(where, "subject", sample.responses, keys)
        for response in sample.responses.values():
            yield from _unknown(where, "judge", response.verdicts, judges)


def _json_fields(evaluation: Evaluation) -> dict[str, Any]:
    fields = _ADAPTER.dump_python(evaluation, by_alias=True)
    for change in fields["changes"]:
        del change["task" if change["task"] is None else "set"]
    # Releases before this field reject it: a file without overlaps stays readable for them.
    if not fields["overlaps"]:
        del fields["overlaps"]
    return {"kind": KIND, "version": VERSION, **fields}


def save_evaluation(evaluation: Evaluation, path: Path) -> None:
    """Write `evaluation` to `path`, as a whole or not at all.

    Errors: HeaderError if it contradicts itself; NonFiniteError.
    """
    raise_errors([HeaderError(f"evaluation: {text}") for text in inconsistencies(evaluation)])
    fields = _json_fields(evaluation)
    canonical_json(fields, "evaluation")
    replace_file(Path(path), pretty_json(fields))


def load_evaluation(path: Path) -> Evaluation:
    """Read the evaluation in the file `path`; all problems in one error.

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
        evaluation = _ADAPTER.validate_json(canonical_json(fields, str(path)))
    except ValidationError as error:
        raise_errors(
            [
                HeaderError(
                    f"{path}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}, "
                    f"found {problem['input']!r:.80}"
                )
                for problem in error.errors()
            ]
        )
        raise
    raise_errors([HeaderError(f"{path}: {text}") for text in inconsistencies(evaluation)])
    return evaluation
