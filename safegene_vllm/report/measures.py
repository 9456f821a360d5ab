"""What a report shows as a number: each measure with its name, its words and where its rate is.

A measure is a set of prompts with a judge, or a task. Torch-free; knows evaluations, not HTML.
"""

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
LOWER_IS_BETTER: dict[Topic, bool] = {
    "attack": True,
    "accuracy": False,
    "over_refusal": True,
    "refusal": True,
    "harm": True,
    "coherence": False,
}


@dataclass(frozen=True)
class Measure:
    """One number per subject; `name` is the set's or the task's, `judge` is None for a task."""

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
        return "lower is better" if LOWER_IS_BETTER[self.topic] else "higher is better"

    def of(self, subject: TargetResult | None) -> Rate | None:
        """This measure's rate of `subject`, None if it was not measured."""
        if subject is None:
            return None
        if self.judge is None:
            return subject.accuracy.get(self.name)
        return subject.rates.get(self.name, {}).get(self.judge)

    def change(self, found: MergedEvaluation, tenant: str) -> Rate | None:
        """After minus before of `tenant` with its paired interval, None if it was not computed."""
        if self.judge is None:
            return found.change(tenant, task=self.name, judge=None)
        return found.change(tenant, set=self.name, judge=self.judge)


def _topic(record: SetRecord, judge: JudgeRecord) -> Topic:
    if judge.says == "coherent":
        return "coherence"
    if record.kind == "harmful":
        return "attack"
    if judge.says == "harmful":
        return "harm"
    return "over_refusal" if record.kind == "over_refusal" else "refusal"


def measures(found: MergedEvaluation, *topics: Topic) -> list[Measure]:
    """Every measure of these topics (default: all) that any subject has, topic by topic."""
    every = [
        Measure(_topic(record, judge), name, judge.name, record.n)
        for name, record in found.sets.items()
        for judge in found.judges.values()
    ]
    every += [Measure("accuracy", name, None, task.n) for name, task in found.tasks.items()]
    subjects = found.subjects.values()
    measured = [m for m in every if any(m.of(subject) is not None for subject in subjects)]
    return [m for topic in topics or TITLES for m in measured if m.topic == topic]


def in_words(measure: Measure, found: MergedEvaluation) -> str:
    """What the rate is a share of, and who decided, as a sentence without its full stop."""
    if measure.judge is None:
        return (
            f"share of the {measure.n} questions of task {measure.name} that were answered right: "
            "the first label named in the answer is the right one"
        )
    says = found.judges[measure.judge].says
    prompts = {"harmful": "harmful", "over_refusal": "harmless but harmful-sounding"}
    kind = prompts.get(found.sets[measure.name].kind, "ordinary")
    what = {
        "attack": "were not refused" if says == "refused" else "were answered with harmful text",
        "over_refusal": "were refused all the same",
        "refusal": "were refused",
        "harm": "were answered with harmful text",
        "coherence": "were answered with coherent text",
        "accuracy": "",
    }[measure.topic]
    return (
        f"share of the {measure.n} {kind} prompts of set {measure.name} that {what}, "
        f"decided by the judge {measure.judge}"
    )
