"""The part of a report that shows answers side by side, with what each judge said of them.

Text that the evaluation withheld stays withheld. Not for rates.
"""

from __future__ import annotations

from safegene_vllm.evaluation.results import Sample, SampleResponse, SetKind
from safegene_vllm.report.merge import MergedEvaluation
from safegene_vllm.report.page import Html, el, join

_SET_WORDS: dict[SetKind, str] = {
    "harmful": "harmful prompts",
    "over_refusal": "harmless prompts that sound harmful",
    "benign": "ordinary prompts",
}


def _chip(found: MergedEvaluation, kind: SetKind, judge: str, verdict: bool) -> Html:
    """A judge's verdict in words and a sign; good and bad depend on what was asked."""
    says = found.judges[judge].says
    if says == "coherent":
        good, word = verdict, "coherent" if verdict else "not coherent"
    elif says == "harmful":
        good, word = not verdict, "harmful" if verdict else "not harmful"
    else:
        good, word = verdict == (kind == "harmful"), "refused" if verdict else "not refused"
    sign = "✓" if good else "✗"
    return el("span", f"{sign} {word} ({judge})", class_=f"chip {'good' if good else 'bad'}")


def _answer(
    found: MergedEvaluation, kind: SetKind, title: str, state: str, answer: SampleResponse
) -> Html:
    if answer.text is None:
        text = el("p", "Withheld: not a refusal beyond doubt.", class_="quiet")
    else:
        text = el("p", answer.text or "(an empty answer)")
    chips = [_chip(found, kind, judge, verdict) for judge, verdict in answer.verdicts.items()]
    look = f"answer {state}" if state in ("before", "after") else "answer"
    return el("div", el("small", title), text, *chips, class_=look)


def _sample(found: MergedEvaluation, sample: Sample, *, is_open: bool) -> Html:
    kind = found.sets[sample.set].kind
    parent = found.parent
    shown: list[Html] = []
    if parent is not None and parent.key in sample.answers:
        answer = sample.answers[parent.key]
        shown.append(_answer(found, kind, "parent", "parent", answer))
    for tenant in found.tenants:
        cards = [
            _answer(found, kind, f"{tenant}, {state}", state, sample.answers[subject.key])
            for state, subject in found.of(tenant).items()
            if subject.key in sample.answers
        ]
        if cards:
            shown.append(el("div", *cards, class_="pair"))
    opened = {"open": "open"} if is_open else {}
    return el(
        "details", el("summary", el("span", sample.prompt, class_="prompt")), *shown, **opened
    )


def samples(found: MergedEvaluation) -> Html:
    """Set by set the sampled prompts, the first of each set unfolded."""
    parts: list[Html] = []
    for name, record in found.sets.items():
        own = [sample for sample in found.samples if sample.set == name]
        if own:
            parts.append(el("h3", f"{name}: {_SET_WORDS[record.kind]}"))
        parts += [_sample(found, sample, is_open=sample is own[0]) for sample in own]
    if not parts:
        return el("p", "The evaluation holds no sample answers.")
    lead = (
        "A few prompts as an illustration; the rates above are over all of them. An answer to a "
        "harmful prompt is shown only if every judge of words calls it a refusal and no judge "
        "calls it harmful; the others are withheld."
    )
    return join(el("p", lead), *parts)
