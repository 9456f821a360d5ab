"""The part of a report that says how it was made: settings, data, judges, digests, versions.

With it a reader can tell whether two reports may be compared. Not for results.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from safegene_vllm import __version__
from safegene_vllm.formats.family import FamilyHeader
from safegene_vllm.formats.profile import Profile
from safegene_vllm.report.merge import MergedEvaluation
from safegene_vllm.report.page import Html, el, join, table

_SAYS = {
    "refused": "whether an answer is a refusal",
    "harmful": "whether an answer is harmful",
    "coherent": "whether an answer is coherent text",
}


def _digest(text: str | None) -> Html:
    return el("span", "none") if text is None else el("code", text)


def _record(title: str, record: Mapping[str, Any]) -> Html:
    """A free-form record of a recipe or a calibration, folded away."""
    written = json.dumps(record, indent=2, ensure_ascii=False)
    return el("details", el("summary", title), el("pre", written))


def _runs(found: MergedEvaluation) -> Html:
    columns = ["Evaluation", "Made by", "Answers", "Longest answer", "Family"]
    rows = [
        [
            name,
            run.made_by,
            f"{run.settings.backend}, {run.settings.dtype}, greedy",
            f"{run.settings.max_tokens} tokens, tasks {run.settings.task_tokens}",
            run.family.name if run.family is not None else "none",
        ]
        for name, run in found.runs.items()
    ]
    return table(columns, rows)


def _data(found: MergedEvaluation) -> Html:
    sets = [
        [
            name,
            s.kind.replace("_", "-"),
            str(s.n),
            s.source,
            s.licence or "not recorded",
            _digest(s.digest),
        ]
        for name, s in found.sets.items()
    ]
    tasks = [
        [name, "task", str(t.n), t.source, t.licence or "not recorded", _digest(t.digest)]
        for name, t in found.tasks.items()
    ]
    return table(["Data", "Kind", "Rows", "Source", "Licence", "Digest"], sets + tasks)


def _judges(found: MergedEvaluation) -> Html:
    rows = [[judge.name, _SAYS[judge.says], judge.rule] for judge in found.judges.values()]
    return table(["Judge", "Decides", "Rule"], rows)


def _vectors(
    found: MergedEvaluation, header: FamilyHeader | None, profiles: Mapping[str, Profile]
) -> list[Html]:
    rows = [[f"family {f.name}", _digest(f.digest)] for f in found.families.values()]
    if header is not None and header.digest not in found.families:
        rows.append([f"family {header.name}", _digest(header.digest)])
    rows += [
        [f"{subject.name}, {subject.state}", _digest(subject.profile)]
        for subject in found.subjects.values()
        if subject.profile is not None
    ]
    parts = [table(["Family or profile", "Digest"], rows)] if rows else []
    if header is not None:
        base = header.base
        parts.append(
            el(
                "p",
                f"Base of {header.name}: {base.architecture}, {base.num_layers} layers, ",
                _digest(base.fingerprint),
            )
        )
        parts.append(_record(f"Recipe of family {header.name}", header.recipe))
    parts += [
        _record(f"Calibration of {tenant}", profile.calibration)
        for tenant, profile in profiles.items()
        if profile.calibration
    ]
    return parts


def provenance_section(
    found: MergedEvaluation, header: FamilyHeader | None, profiles: Mapping[str, Profile]
) -> Html:
    """Settings, data sets with digests and licences, judges with their rules, digests, versions."""
    parts = [_runs(found)]
    if found.sets or found.tasks:
        parts += [el("h3", "Data"), _data(found)]
    if found.judges:
        parts += [el("h3", "Judges"), _judges(found)]
    vectors = _vectors(found, header, profiles)
    if vectors:
        parts += [el("h3", "Vector"), *vectors]
    parts.append(el("p", f"This page: safegene-vllm {__version__}.", class_="quiet"))
    return join(*parts)
