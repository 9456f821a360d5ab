"""The parts of a report that show rates: the summary, attack success, utility, refusal, coherence.

Every number comes with its 95 % interval and its n. Not for how the numbers came about.
"""

from __future__ import annotations

from collections.abc import Sequence

from safegene_vllm.evaluation.results import TargetResult
from safegene_vllm.evaluation.statistics import Rate
from safegene_vllm.report import plots
from safegene_vllm.report.measures import Measure, in_words, measures
from safegene_vllm.report.merge import MergedEvaluation
from safegene_vllm.report.page import Html, el, figure, join, table

NOTHING = "–"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _points(value: float, sign: str = "-") -> str:
    """A share in hundredths with one decimal; no sign on what is written 0.0."""
    return f"{round(100 * value, 1) + 0.0:{sign}.1f}".replace("+0.0", "0.0").replace("-", "−")


def _interval(rate: Rate) -> str:
    return f"{_points(rate.low)} to {_points(rate.high)}, n {rate.n}"


def rate_cell(rate: Rate | None) -> Html:
    """`3.0 %` over `1.0 to 6.0, n 100`."""
    if rate is None:
        return el("span", NOTHING)
    return join(el("span", percent(rate.rate)), el("small", _interval(rate)))


def change_cell(change: Rate | None) -> Html:
    """`−90.0 points` over its interval: a difference of two shares, not a share of one."""
    if change is None:
        return el("span", NOTHING)
    points = _points(change.rate, "+")
    return join(el("span", f"{points} points"), el("small", _interval(change)))


def rates_table(
    found: MergedEvaluation, states: dict[str, TargetResult], of: Sequence[Measure]
) -> Html | None:
    """A row per measure of one tenant, a column per state, the change and the parent's rate.

    None if the tenant has none of these measures.
    """
    tenant = next((subject.name for subject in states.values()), "")
    rows = [m for m in of if any(m.of(subject) is not None for subject in states.values())]
    if not rows:
        return None
    both = {"before", "after"} <= states.keys()
    parent = found.parent
    others = [state for state in states if not both or state not in ("before", "after")]
    columns = ["Measure", *(["Before", "After", "After − before"] if both else [])]
    columns += [f"{state[:1].upper()}{state[1:]}" for state in others]
    columns += ["Parent"] if parent is not None else []
    cells = []
    for measure in rows:
        row = [join(el("span", measure.title), el("small", f"{measure.where}; {measure.better}"))]
        if both:
            row += [rate_cell(measure.of(states[state])) for state in ("before", "after")]
            row.append(change_cell(measure.change(found, tenant)))
        row += [rate_cell(measure.of(states[state])) for state in others]
        row += [rate_cell(measure.of(parent))] if parent is not None else []
        cells.append(row)
    return table(columns, cells)


def _words(found: MergedEvaluation) -> Html:
    """What the words in the tables mean."""
    states = {
        "before": "the tenant's fine-tuned model as it came",
        "after": "the same model with the family's safety vector at the tenant's own coefficients",
        "parent": "the aligned model that the tenants started from",
    }
    present = {subject.state for subject in found.subjects.values()}
    words = {state: means for state, means in states.items() if state in present}
    if measures(found, "attack"):
        by = [
            f"{judge.name} counts an answer that "
            + ("is no refusal" if judge.says == "refused" else "it finds harmful")
            for judge in found.judges.values()
            if judge.says != "coherent"
        ]
        words["attack success"] = f"the share of harmful prompts that got through; {'; '.join(by)}"
    if measures(found, "over_refusal"):
        words["over-refusal"] = (
            "the share of harmless prompts that only sound harmful and were refused all the same"
        )
    if measures(found, "accuracy"):
        words["accuracy"] = "the share of a task's questions that were answered right"
    words["small print"] = (
        "the 95 % bootstrap interval, and n, the number of prompts. An interval of width 0 at 0 % "
        "or 100 % means that nothing else was seen, not that nothing else can happen"
    )
    if found.changes:
        words["after − before"] = "a difference in percentage points, in pairs of the same prompts"
    lines = [el("li", el("strong", word), f": {means}.") for word, means in words.items()]
    return join(el("h3", "What the words mean"), el("ul", *lines))


def _only_parent(found: MergedEvaluation) -> Html:
    told = el("p", "No tenant was evaluated, only the parent.", class_="note")
    rows = [
        [join(el("span", m.title), el("small", m.where)), rate_cell(m.of(found.parent))]
        for m in measures(found)
        if m.of(found.parent) is not None
    ]
    return join(told, table(["Measure", "Parent"], rows)) if rows else told


def summary(found: MergedEvaluation) -> Html:
    """Per tenant: attack success, accuracy and over-refusal, before, after and of the parent."""
    parts = [el("p", note, class_="note") for note in found.notes]
    shown = measures(found, "attack", "accuracy", "over_refusal")
    for tenant in found.tenants:
        parts.append(el("h3", tenant))
        made = rates_table(found, found.of(tenant), shown)
        parts.append(made or el("p", "Neither attacks, nor tasks, nor over-refusal were measured."))
    if not found.tenants:
        parts.append(_only_parent(found))
    return join(*parts, _words(found))


def _bars(found: MergedEvaluation, measure: Measure) -> list[plots.Bar]:
    return [
        plots.Bar(tenant, state, rate)
        for tenant in found.tenants
        for state, subject in found.of(tenant).items()
        if (rate := measure.of(subject)) is not None
    ]


def _plot_of(found: MergedEvaluation, measure: Measure) -> Html | None:
    """Bars of one measure with its words; None if no tenant has it."""
    bars, parent = _bars(found, measure), measure.of(found.parent)
    if not bars:
        return None
    if measure.topic == "attack":
        plot = plots.attack_success(bars, judge=measure.judge or "", parent=parent)
    else:
        what = f"{measure.title.lower()} ({measure.better})\n{measure.where}"
        plot = plots.rates(bars, what=what, parent=parent)
    words = in_words(measure, found)
    words = f"{words[0].upper()}{words[1:]}. Thin lines: 95 % intervals."
    if parent is not None:
        words += f" Dashed: the parent, {percent(parent.rate)} ({_interval(parent)})."
    return figure(plot, words)


def _plots(found: MergedEvaluation, of: Sequence[Measure]) -> Html | None:
    made = [plot for measure in of if (plot := _plot_of(found, measure)) is not None]
    return el("div", *made, class_="plots") if made else None


def attack_success(found: MergedEvaluation) -> Html:
    """A plot per harmful set and judge."""
    return _plots(found, measures(found, "attack")) or el(
        "p", "No tenant was asked harmful prompts."
    )


def _places(
    found: MergedEvaluation, attack: Measure, tasks: Sequence[Measure]
) -> list[plots.Point]:
    """A point per tenant and state; the parent only where there is one task to place it by."""
    points = []
    subjects = [s for tenant in found.tenants for s in found.of(tenant).values()]
    if found.parent is not None and len(tasks) == 1:
        subjects.append(found.parent)
    for subject in subjects:
        for task in tasks:
            accuracy, success = task.of(subject), attack.of(subject)
            if accuracy is not None and success is not None:
                points.append(plots.Point(subject.name, subject.state, accuracy, success))
    return points


def safety_utility(found: MergedEvaluation) -> Html:
    """Accuracy against attack success: one plot if each tenant has one task, else one per task."""
    tasks = measures(found, "accuracy")
    several = any(
        len(subject.accuracy) > 1
        for subject in found.subjects.values()
        if subject.state != "parent"
    )
    groups = [[task] for task in tasks] if several else [tasks] if tasks else []
    made = []
    for attack in measures(found, "attack"):
        for group in groups:
            points = _places(found, attack, group)
            if all(point.state == "parent" for point in points):
                continue
            names = [task.name for task in group]
            axis = f"accuracy on {names[0]}" if len(names) == 1 else "accuracy on own task"
            questions = " or ".join(f"{task.n} of {task.name}" for task in group)
            words = (
                f"Across: share of the questions answered right ({questions}). Up: "
                f"{in_words(attack, found)}. An arrow goes from before to after; down and right "
                "is better. Thin lines: 95 % intervals."
            )
            made.append(figure(plots.safety_utility(points, accuracy=axis), words))
    if not made:
        return el("p", "This needs both a task and harmful prompts for the same tenant.")
    return el("div", *made, class_="plots")


def refusal_and_coherence(found: MergedEvaluation) -> Html:
    """Plots of what must not get worse, and a table of everything that was measured."""
    shown = measures(found, "over_refusal", "refusal", "harm", "coherence")
    parts = [_plots(found, shown) or el("p", "No tenant was asked harmless prompts.")]
    everything = []
    for tenant in found.tenants:
        made = rates_table(found, found.of(tenant), measures(found))
        everything += [el("h3", tenant), made] if made is not None else []
    if everything:
        parts.append(
            el("details", el("summary", "Everything that was measured, in numbers"), *everything)
        )
    return join(*parts)
