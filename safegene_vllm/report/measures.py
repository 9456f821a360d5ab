"""Measures of a report: a prompt set with a judge, or a task; each with its title and its rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from safegene_vllm.evaluation.results import JudgeRecord, SetRecord, TargetResult
from safegene_vllm.evaluation.statistics import Rate
from safegene_vllm.report.merge import MergedEvaluation

Topic = Literal["attack", "accuracy", "over_refusal", "refusal", "harm", "coherence"]

TITLES: dict[Topic, str] = {
    "attack": "Attack success",
    "accuracy": "Accuracy",
    "over_refusal": "Over-refusal",
    "refusal": "Refusal of ordinary prompts",
    "harm": "Judged harmful",
    "coherence": "Coherence",
}
_HIGHER_IS_BETTER = ("accuracy", "coherence")


@dataclass(frozen=True)
class Measure:
    """One rate per target; `name` is the set's or the task's, `judge` is None for a task."""

    topic: Topic
    name: str
    judge: str | None
    n: int

    @property
    def title(self) -> str:
        return TITLES[self.topic]

    @property
    def where(self) -> str:
        """`advbench, strings:opening` or the task's name."""
        return self.name if self.judge is None else f"{self.name}, {self.judge}"

    @property
    def better(self) -> str:
        return f"{'higher' if self.topic in _HIGHER_IS_BETTER else 'lower'} is better"

    def rate_of(self, target: TargetResult | None) -> Rate | None:
        """This measure's rate of `target`, None if it was not measured."""
        if target is None:
            return None
        if self.judge is None:
            return target.accuracy.get(self.name)
        return target.rates.get(self.name, {}).get(self.judge)

    def change(self, merged: MergedEvaluation, tenant: str) -> Rate | None:
        """After minus before of `tenant` with its paired interval, None if it was not computed."""
        if self.judge is None:
            return merged.change(tenant, task=self.name, judge=None)
        return merged.change(tenant, set=self.name, judge=self.judge)


def _topic(record: SetRecord, judge: JudgeRecord) -> Topic:
    if judge.says == "coherent":
        return "coherence"
    if record.kind == "harmful":
        return "attack"
    if judge.says == "harmful":
        return "harm"
    return "over_refusal" if record.kind == "over_refusal" else "refusal"


def measures(merged: MergedEvaluation, *topics: Topic) -> list[Measure]:
    """All measures of these topics (default: all) that any target has, by topic."""
    every = [
        Measure(_topic(record, judge), name, judge.name, record.n)
        for name, record in merged.sets.items()
        for judge in merged.judges.values()
    ]
    every += [Measure("accuracy", name, None, task.n) for name, task in merged.tasks.items()]
    targets = merged.targets.values()
    measured = [m for m in every if any(m.rate_of(target) is not None for target in targets)]
    return [m for topic in topics or TITLES for m in measured if m.topic == topic]


def describe(measure: Measure, merged: MergedEvaluation) -> str:
    """What the rate is a share of, and by which judge, as a sentence without its period."""
    if measure.judge is None:
        return (
            f"share of the {measure.n} questions of task {measure.name} that were answered "
            "correctly: the first label named in the response is the correct one"
        )
    prompts = {"harmful": "harmful", "over_refusal": "harmless but harmful-sounding"}
    kind = prompts.get(merged.sets[measure.name].kind, "ordinary")
    refused = merged.judges[measure.judge].says == "refused"
    outcome = {
        "attack": "were not refused" if refused else "were answered with harmful text",
        "over_refusal": "were refused",
        "refusal": "were refused",
        "harm": "were answered with harmful text",
        "coherence": "were answered with coherent text",
        "accuracy": "",
    }[measure.topic]
    return (
        f"share of the {measure.n} {kind} prompts of set {measure.name} that {outcome}, "
        f"decided by the judge {measure.judge}"
    )
