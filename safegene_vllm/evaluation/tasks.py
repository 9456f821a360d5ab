"""Labeled tasks: an instruction per row, and the label read from the greedy response.

sst2, ag_news, boolq and mnli in the usual files, each under an instruction of ours; any other name
is rows of prompt and answer. Responses are graded, not likelihoods of labels: as a user sees them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from safegene_vllm.dataset import (
    Dataset,
    Row,
    Table,
    as_dataset,
    digest_of_rows,
    read_dataset,
    read_table,
)
from safegene_vllm.errors import ConfigError

MAX_LABELS = 20
MAX_LABEL_WORDS = 3


@dataclass(frozen=True)
class Task:
    """Questions with their reference answers, in `data`.

    `labels` are the possible answers (empty: free text; one: the required beginning); `aliases`
    are other words for them, in lower case.
    """

    name: str
    labels: tuple[str, ...]
    data: Dataset
    aliases: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Form:
    """Template of a well-known task: instruction, columns, labels.

    `columns`: the sets of columns that its files come in, the gold label's first.
    `gold`: from (column, value in lower case) to the label; None drops the row.
    """

    instruction: str
    columns: tuple[tuple[str, ...], ...]
    labels: tuple[str, ...]
    gold: Callable[[str, str], str | None]
    headers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)


def _table_of(
    values: Mapping[str, str], by_column: Mapping[str, Mapping[str, str]] | None = None
) -> Callable[[str, str], str]:
    """A lookup from value to label; a column in `by_column` has its own table."""

    def gold(column: str, value: str) -> str:
        return (by_column or {}).get(column, values)[value]

    return gold


_TOPICS = ("World", "Sports", "Business", "Sci/Tech")
_BY_TOPIC = {topic.lower(): topic for topic in _TOPICS}
_RELATIONS = ("entailment", "neutral", "contradiction")


def _relation(column: str, value: str) -> str | None:
    """MNLI's label; None where its annotators found none (`-`, or -1)."""
    if value in ("-", "-1"):
        return None
    return {**dict(zip("012", _RELATIONS, strict=True)), **{r: r for r in _RELATIONS}}[value]


FORMS: Mapping[str, Form] = {
    "sst2": Form(
        "Is the sentiment of this sentence from a film review positive or negative? "
        "Answer with one word.\n\n{sentence}",
        (("label", "sentence"),),
        ("positive", "negative"),
        _table_of(
            {"1": "positive", "0": "negative", "positive": "positive", "negative": "negative"}
        ),
    ),
    "ag_news": Form(
        "Which topic does this news text belong to: World, Sports, Business or Sci/Tech? "
        "Answer with the topic only.\n\n{text}",
        (
            ("class", "title", "description"),
            ("Class Index", "Title", "Description"),
            ("class", "description"),
            ("label", "text"),
        ),
        _TOPICS,
        _table_of(
            {str(n): topic for n, topic in enumerate(_TOPICS, 1)} | _BY_TOPIC,
            # The data set of this name on the Hugging Face Hub counts from 0.
            {"label": {str(n): topic for n, topic in enumerate(_TOPICS)} | _BY_TOPIC},
        ),
        {".csv": ("class", "title", "description"), ".tsv": ("description", "class")},
        {"science": "Sci/Tech", "technology": "Sci/Tech", "tech": "Sci/Tech", "sci": "Sci/Tech"}
        | {"sport": "Sports"},
    ),
    "boolq": Form(
        "{passage}\n\nBy this text, {question}? Answer yes or no.",
        (("answer", "question", "passage"), ("label", "question", "passage")),
        ("yes", "no"),
        _table_of(
            dict.fromkeys(("true", "yes", "1"), "yes") | dict.fromkeys(("false", "no", "0"), "no")
        ),
        aliases={"true": "yes", "false": "no"},
    ),
    "mnli": Form(
        "Premise: {premise}\nHypothesis: {hypothesis}\n\nIs the relation of the premise to the "
        "hypothesis entailment, neutral or contradiction? Answer with one word.",
        (("gold_label", "sentence1", "sentence2"), ("label", "premise", "hypothesis")),
        _RELATIONS,
        _relation,
    ),
}
"""Tasks known by name."""


def _question(form: Form, columns: Sequence[str], row: Mapping[str, Any]) -> str:
    texts = [str(row[column]).strip() for column in columns[1:]]
    if form is FORMS["ag_news"]:
        parts = {"text": "\n".join(texts)}
    elif form is FORMS["mnli"]:
        parts = dict(zip(("premise", "hypothesis"), texts, strict=True))
    else:
        parts = dict(zip(columns[1:], texts, strict=True))
    if "question" in parts:
        parts["question"] = parts["question"].rstrip("?")
    return re.sub(r"\{(\w+)\}", lambda m: parts[m[1]], form.instruction)


def _columns_in(form: Form, table: Table) -> tuple[str, ...] | None:
    return next((c for c in form.columns if set(c) <= set(table.columns)), None)


def _read_form(name: str, form: Form, source: str, what: str) -> Task:
    table = read_table(source, what=what)
    columns = _columns_in(form, table)
    header = next((h for s, h in form.headers.items() if table.name.endswith(s)), None)
    if columns is None and header is not None and "header" not in table.options:
        table = read_table(source, header=header, what=what)
        columns = _columns_in(form, table)
    if columns is None:
        expected = " or ".join(", ".join(choice) for choice in form.columns)
        raise ConfigError(
            f"{table.label}: {name} needs the columns {expected}; found "
            f"{', '.join(table.columns[:8])}"
        )
    rows: list[Row] = []
    wrong: list[str] = []
    empty: list[int] = []
    for number, row in table.rows:
        value = str(row.get(columns[0])).strip()
        if any(not str(row.get(column) or "").strip() for column in columns[1:]):
            empty.append(number)
            continue
        try:
            gold = form.gold(columns[0], value.lower())
        except KeyError:
            wrong.append(f"{number} ({value})")
            continue
        if gold is not None:
            rows.append(Row(_question(form, columns, row), gold))
    if empty:
        raise ConfigError(f"{table.label}: rows {empty[:8]} have no {' or '.join(columns[1:])}")
    if wrong:
        raise ConfigError(
            f"{table.label}: the {columns[0]} of rows {', '.join(wrong[:8])} is none of {name}'s: "
            f"{', '.join(form.labels)}"
        )
    if not rows:
        raise ConfigError(f"{table.label}: no row has a label of {name}")
    return Task(name, form.labels, as_dataset(table, rows), form.aliases)


def read_task(name: str, source: str, *, what: str = "--task") -> Task:
    """The task `name` over the rows of `source`.

    sst2: sentence, label. ag_news: class, title, description, with a header or without. boolq:
    question, passage, answer. mnli: premise, hypothesis, label, or GLUE's names; rows without a
    gold label are left out. Other names: prompt and answer, stripped; the answers are labels if
    they are at most 20 of at most 3 words, else free text. Errors: those of
    `read_dataset`; ConfigError for an unknown label, missing columns, or labels that differ only in
    their case.
    """
    if name in FORMS:
        return _read_form(name, FORMS[name], source, what)
    read = read_dataset(source, need_answers=True, what=what)
    rows = tuple(Row(row.prompt, str(row.answer).strip()) for row in read.rows)
    data = replace(read, rows=rows, digest=digest_of_rows(rows))
    labels = tuple(sorted({str(row.answer) for row in rows}))
    short = all(0 < len(label.split()) <= MAX_LABEL_WORDS for label in labels)
    if not short or len(labels) > MAX_LABELS:
        return Task(name, (), data)
    first: dict[str, str] = {}
    if duplicates := [x for x in labels if first.setdefault(x.lower(), x) != x]:
        pairs = ", ".join(f"{first[label.lower()]!r} and {label!r}" for label in duplicates)
        raise ConfigError(
            f"{what} {read.name}: the labels {pairs} differ only in their case, which is "
            "ignored in responses; write each label in one way"
        )
    return Task(name, labels, data)


def _plain(text: str) -> str:
    return " ".join(text.split()).rstrip(".").casefold()


def correct(task: Task, response: str, gold: str) -> bool:
    """True if the first label in the response is the gold one: a whole word, in any case.

    A task of one label is a style: the response has to begin with it. Free text is correct if it
    equals the gold text except for case, whitespace and a final period.
    """
    if not task.labels:
        return _plain(response) == _plain(gold)
    names = {label.lower(): label for label in task.labels} | dict(task.aliases)
    # Longest first, so that "sci/tech" does not match as "sci".
    choice = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    find = re.match if len(task.labels) == 1 else re.search
    found = find(rf"(?<!\w)({choice})(?!\w)", response.lower().strip())
    return found is not None and names[found[1]] == gold
