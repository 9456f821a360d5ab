"""Contents of the report's sections: tables of cells, plots with captions, terms.

Every rate is shown with its 95 % interval and its n.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from safegene_vllm.evaluation.results import (
    FamilyRecord,
    LayerScore,
    SetRecord,
    TargetResult,
    TaskRecord,
)
from safegene_vllm.evaluation.statistics import Rate
from safegene_vllm.formats.family import FamilyHeader
from safegene_vllm.formats.metadata import is_number
from safegene_vllm.formats.profile import Profile
from safegene_vllm.report import plots
from safegene_vllm.report.figure import svg
from safegene_vllm.report.measures import Measure, describe, measures
from safegene_vllm.report.merge import MergedEvaluation
from safegene_vllm.report.page import markup

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Column names and rows of cells; a cell that is not Markup is escaped."""

_DECIDES = {
    "refused": "whether a response is a refusal",
    "harmful": "whether a response is harmful",
    "coherent": "whether a response is coherent text",
}


@dataclass(frozen=True)
class Plot:
    """An inline SVG and its caption."""

    svg: Markup
    caption: str


@dataclass(frozen=True)
class FamilyLayers:
    """A family's layers; `plot` None: the layers were not scored."""

    name: str
    summary: str
    plot: Plot | None


@dataclass(frozen=True)
class FamilyCoefficients:
    """Coefficients of one family's tenants; `name` None where there is one family only."""

    name: str | None
    plot: Plot
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _points(value: float, sign: str = "-") -> str:
    """A share in hundredths with one decimal; a value that rounds to 0.0 has no sign."""
    return f"{round(100 * value, 1) + 0.0:{sign}.1f}".replace("+0.0", "0.0").replace("-", "−")


def _interval(rate: Rate) -> str:
    return f"{_points(rate.low)} to {_points(rate.high)}, n {rate.n}"


def _cell(value: str, detail: str) -> Markup:
    return markup("<span>{}</span><small>{}</small>", value, detail)


def _rate_cell(rate: Rate | None) -> str:
    return "–" if rate is None else _cell(_percent(rate.rate), _interval(rate))


def _change_cell(change: Rate | None) -> str:
    """A difference of two shares, in percentage points."""
    if change is None:
        return "–"
    return _cell(f"{_points(change.rate, '+')} points", _interval(change))


def rates_table(merged: MergedEvaluation, tenant: str, of: Sequence[Measure]) -> Table | None:
    """A row per measure, a column per state of the tenant, the change and the parent's rate.

    None if the tenant has none of these measures.
    """
    states, parent = merged.states_of(tenant), merged.parent
    rows = [m for m in of if any(m.rate_of(target) is not None for target in states.values())]
    if not rows:
        return None
    both = {"before", "after"} <= states.keys()
    others = [state for state in states if not both or state not in ("before", "after")]
    columns = ["Measure", *(["Before", "After", "After − before"] if both else [])]
    columns += [f"{state[:1].upper()}{state[1:]}" for state in others]
    cells = []
    for measure in rows:
        row: list[str] = [_cell(measure.title, f"{measure.where}; {measure.better}")]
        if both:
            row += [_rate_cell(measure.rate_of(states[state])) for state in ("before", "after")]
            row.append(_change_cell(measure.change(merged, tenant)))
        row += [_rate_cell(measure.rate_of(states[state])) for state in others]
        cells.append(row + ([] if parent is None else [_rate_cell(measure.rate_of(parent))]))
    return columns + ([] if parent is None else ["Parent"]), cells


def parent_table(merged: MergedEvaluation) -> Table | None:
    """All rates of the parent, for evaluations without tenants; None if there are none."""
    rows = [
        [_cell(measure.title, measure.where), _rate_cell(rate)]
        for measure in measures(merged)
        if (rate := measure.rate_of(merged.parent)) is not None
    ]
    return (["Measure", "Parent"], rows) if rows else None


def terms(merged: MergedEvaluation) -> dict[str, str]:
    """Definitions of the terms that occur in the tables."""
    states = {
        "before": "the tenant's fine-tuned model without a safety vector",
        "after": "the same model with the family's safety vector at the tenant's own coefficients",
        "parent": "the aligned model that the tenants started from",
    }
    present = {target.state for target in merged.targets.values()}
    found = {state: meaning for state, meaning in states.items() if state in present}
    if measures(merged, "attack"):
        by = [
            f"{judge.name} counts a response that "
            + ("is no refusal" if judge.says == "refused" else "it finds harmful")
            for judge in merged.judges.values()
            if judge.says != "coherent"
        ]
        found["attack success"] = f"the share of harmful prompts that got through; {'; '.join(by)}"
    if measures(merged, "over_refusal"):
        found["over-refusal"] = (
            "the share of harmless prompts that only sound harmful and were refused"
        )
    if measures(merged, "accuracy"):
        found["accuracy"] = "the share of a task's questions that were answered correctly"
    found["small print"] = (
        "the 95 % bootstrap interval, and n, the number of prompts. An interval of width 0 at 0 % "
        "or 100 % means that nothing else was observed, not that nothing else can happen"
    )
    if merged.changes:
        found["after − before"] = "a difference in percentage points over the same prompts, paired"
    return found


def _rates_plot(merged: MergedEvaluation, measure: Measure) -> Plot | None:
    """Bars of one measure; None if no tenant has it."""
    parent = measure.rate_of(merged.parent)
    bars = [
        plots.Bar(tenant, state, rate)
        for tenant in merged.tenants
        for state, target in merged.states_of(tenant).items()
        if (rate := measure.rate_of(target)) is not None
    ]
    if not bars:
        return None
    what = f"{measure.title.lower()} ({measure.better})\n{measure.where}"
    words = describe(measure, merged)
    caption = f"{words[0].upper()}{words[1:]}. Thin lines: 95 % intervals."
    if parent is not None:
        caption += f" Dashed: the parent, {_percent(parent.rate)} ({_interval(parent)})."
    return Plot(Markup(svg(plots.draw_rates(bars, what=what, parent=parent), what)), caption)


def rates_plots(merged: MergedEvaluation, of: Sequence[Measure]) -> list[Plot]:
    """A bar plot per measure that a tenant has."""
    return [plot for measure in of if (plot := _rates_plot(merged, measure)) is not None]


def _utility_points(
    merged: MergedEvaluation, attack: Measure, tasks: Sequence[Measure]
) -> list[plots.Point]:
    """A point per tenant and state; the parent only if there is one task to place it by."""
    targets = [t for tenant in merged.tenants for t in merged.states_of(tenant).values()]
    if merged.parent is not None and len(tasks) == 1:
        targets.append(merged.parent)
    return [
        plots.Point(target.name, target.state, accuracy, success)
        for target in targets
        for task in tasks
        if (accuracy := task.rate_of(target)) is not None
        and (success := attack.rate_of(target)) is not None
    ]


def utility_plots(merged: MergedEvaluation) -> list[Plot]:
    """Accuracy against attack success: one plot if each tenant has one task, else one per task."""
    tasks = measures(merged, "accuracy")
    targets = [target for target in merged.targets.values() if target.state != "parent"]
    if any(len(target.accuracy) > 1 for target in targets):
        groups = [[task] for task in tasks]
    else:
        groups = [tasks] if tasks else []
    found = []
    for attack in measures(merged, "attack"):
        for group in groups:
            points = _utility_points(merged, attack, group)
            if all(point.state == "parent" for point in points):
                continue
            axis = f"accuracy on {group[0].name}" if len(group) == 1 else "accuracy on own task"
            questions = " or ".join(f"{task.n} of {task.name}" for task in group)
            caption = (
                f"Horizontal: share of the questions answered correctly ({questions}). Vertical: "
                f"{describe(attack, merged)}. An arrow goes from before to after; down and right "
                "is better. Thin lines: 95 % intervals."
            )
            drawn = plots.draw_safety_utility(points, accuracy=axis)
            found.append(Plot(Markup(svg(drawn, f"{axis} against attack success")), caption))
    return found


def _ranges(layers: Sequence[int]) -> str:
    """`0-3, 7` for 0, 1, 2, 3, 7."""
    ranges: list[list[int]] = []
    for layer in sorted(layers):
        if ranges and layer == ranges[-1][1] + 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges) or "none"


def _recipe_scores(recipe: Mapping[str, Any], num_layers: int) -> dict[int, float]:
    """All layers' scores from `selection.scores` of a recipe, a list of one number per layer.

    A recipe is free-form: in any other form there are no scores, {}.
    """
    selection = recipe.get("selection")
    scores = selection.get("scores") if isinstance(selection, dict) else None
    if not isinstance(scores, list) or len(scores) != num_layers:
        return {}
    return {layer: float(score) for layer, score in enumerate(scores) if is_number(score)}


def layer_scores(merged: MergedEvaluation, header: FamilyHeader | None) -> list[FamilyLayers]:
    """Per family a bar per layer; layers that carry the vector are filled."""
    families = dict(merged.families)
    if header is not None:
        layers = tuple(LayerScore(entry.layer, entry.score) for entry in header.layers)
        families.setdefault(header.digest, FamilyRecord(header.name, header.digest, layers))
    found = []
    for digest, family in families.items():
        selected = [entry.layer for entry in family.layers]
        scores = {e.layer: e.score for e in family.layers if e.score is not None}
        known = header if header is not None and header.digest == digest else None
        every = _recipe_scores(known.recipe, known.num_layers) if known else {}
        of = f" of {known.num_layers}" if known else ""
        summary = f"{len(selected)}{of} layers carry the vector: {_ranges(selected)}."
        if every:
            caption = "The score of each layer; the filled ones carry the vector."
        else:
            caption = "The scores of the layers that carry the vector"
            caption += "." if known else "; --family adds the scores of the other layers."
        plot = None
        if scores := {**scores, **every}:
            drawn = plots.draw_layer_scores(scores, selected)
            plot = Plot(Markup(svg(drawn, "score per layer")), caption)
        found.append(FamilyLayers(family.name, summary, plot))
    return found


def coefficients(
    merged: MergedEvaluation, profiles: Mapping[str, Profile]
) -> list[FamilyCoefficients]:
    """Per family a map of tenants and layers, and the numbers; layers of zeros are left out."""
    by_family: dict[str, dict[str, Sequence[float]]] = {}
    for key, target in merged.targets.items():
        if target.coefficients is not None and any(target.coefficients):
            name = target.name if target.state == "after" else f"{target.name}, {target.state}"
            family = by_family.setdefault(merged.family_of.get(key, ""), {})
            family[name] = target.coefficients
    for tenant, profile in profiles.items():
        by_family.setdefault(profile.family, {}).setdefault(tenant, profile.coefficients)
    caption = (
        "Factor of the family's vector, per tenant and layer. An empty cell is 0: nothing is added."
    )
    found = []
    for digest, tenants in by_family.items():
        length = max(map(len, tenants.values()))
        padded = [[*values, *[0.0] * (length - len(values))] for values in tenants.values()]
        several = digest in merged.families and len(merged.families) > 1
        drawn = svg(plots.draw_coefficients(tenants), "Coefficients per layer and tenant")
        found.append(
            FamilyCoefficients(
                merged.families[digest].name if several else None,
                Plot(Markup(drawn), caption),
                ["Layer", *tenants],
                [
                    [str(layer), *(f"{value:.4g}" for value in values)]
                    for layer, values in enumerate(zip(*padded, strict=True))
                    if any(values)
                ],
            )
        )
    return found


def _code(text: str) -> Markup:
    return markup("<code>{}</code>", text)


def provenance(merged: MergedEvaluation, header: FamilyHeader | None) -> dict[str, Table]:
    """Settings, data with digests and licenses, judges with their rules, digests of vectors."""
    runs = [
        [
            name,
            run.made_by,
            f"{run.settings.backend}, {run.settings.dtype}, greedy",
            f"{run.settings.max_tokens} tokens, tasks {run.settings.task_tokens}",
            "none" if run.family is None else run.family.name,
        ]
        for name, run in merged.runs.items()
    ]
    # A set and a task may have the same name.
    records: list[tuple[str, SetRecord | TaskRecord]] = [
        *merged.sets.items(),
        *merged.tasks.items(),
    ]
    data = [
        [name, kind, str(d.n), d.source, d.licence or "not recorded", _code(d.digest)]
        for name, d in records
        for kind in [d.kind.replace("_", "-") if isinstance(d, SetRecord) else "task"]
    ]
    judges = [[j.name, _DECIDES[j.says], j.rule] for j in merged.judges.values()]
    families = {family.digest: family.name for family in merged.families.values()}
    if header is not None:
        families.setdefault(header.digest, header.name)
    targets: list[TargetResult] = list(merged.targets.values())
    digests = [[f"family {name}", _code(digest)] for digest, name in families.items()]
    digests += [[f"{t.name}, {t.state}", _code(t.profile)] for t in targets if t.profile]
    return {
        "runs": (["Evaluation", "Made by", "Generation", "Max tokens", "Family"], runs),
        "data": (["Data", "Kind", "Rows", "Source", "License", "Digest"], data),
        "judges": (["Judge", "Decides", "Rule"], judges),
        "digests": (["Family or profile", "Digest"], digests),
    }
