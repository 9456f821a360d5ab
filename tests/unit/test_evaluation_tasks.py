"""Tasks: the usual files are understood, and the first label that is named counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from safegene_vllm.errors import ConfigError
from safegene_vllm.evaluation.tasks import FORMS, Task, correct, read_task


def read(tmp_path: Path, name: str, file: str, content: Any, query: str = "") -> Task:
    path = tmp_path / file
    if not isinstance(content, str):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_text(content)
    return read_task(name, f"{path}{query}")


def golds(task: Task) -> list[str | None]:
    return [row.answer for row in task.data.rows]


def test_sst2(tmp_path: Path) -> None:
    content = 'sentence\tlabel\n"half a quote \t1\nso dull \t0\n'
    task = read(tmp_path, "sst2", "v.tsv", content)
    assert golds(task) == ["positive", "negative"]
    assert task.data.rows[0].prompt.endswith('one word.\n\n"half a quote')
    assert task.labels == ("positive", "negative")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("t.csv", '3,"A ""title""",Text one.\n1,Other,Text two.\n'),
        ("t.csv", 'Class Index,Title,Description\n3,"A ""title""",Text one.\n1,Other,Text two.\n'),
        ("t.tsv", 'A "title"\\nText one.\tBusiness\nOther\\nText two.\tWorld\n'),
        (
            "t.jsonl",
            [
                {"text": 'A "title"\nText one.', "label": 2},
                {"text": "Other\nText two.", "label": 0},
            ],
        ),
    ],
    ids=["csv", "csv with a header", "tsv", "hub"],
)
def test_ag_news(tmp_path: Path, file: str, content: Any) -> None:
    task = read(tmp_path, "ag_news", file, content)
    assert golds(task) == ["Business", "World"]
    prompt = task.data.rows[0].prompt.replace("\\n", "\n")
    assert prompt.endswith('Answer with the topic only.\n\nA "title"\nText one.')


def test_boolq(tmp_path: Path) -> None:
    rows = [
        {"question": "is it {passage}?", "passage": "It is.", "answer": True},
        {"question": "is it red", "passage": "It is blue.", "answer": False},
    ]
    task = read(tmp_path, "boolq", "b.jsonl", rows)
    assert golds(task) == ["yes", "no"]
    expected = "It is.\n\nBy this text, is it {passage}? Answer yes or no."
    assert task.data.rows[0].prompt == expected


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (
            "m.tsv",
            "sentence1\tsentence2\tgold_label\nA\tB\tneutral\nC\tD\t-\nE\tF\tcontradiction\n",
        ),
        (
            "m.jsonl",
            [
                {"premise": "A", "hypothesis": "B", "label": 1},
                {"premise": "C", "hypothesis": "D", "label": -1},
                {"premise": "E", "hypothesis": "F", "label": 2},
            ],
        ),
    ],
)
def test_mnli(tmp_path: Path, file: str, content: Any) -> None:
    task = read(tmp_path, "mnli", file, content)
    assert golds(task) == ["neutral", "contradiction"]
    assert task.data.rows[0].prompt.startswith("Premise: A\nHypothesis: B\n")


def test_rows_of_ones_own(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "answer": "good" if i % 2 else "bad"} for i in range(6)]
    task = read(tmp_path, "mood", "m.jsonl", [*rows, {"prompt": "x", "answer": "odd"}], "?limit=6")
    assert task.labels == ("bad", "good") and len(task.data.rows) == 6
    free = read(tmp_path, "recall", "r.jsonl", [{"prompt": "p", "answer": "one two three four"}])
    assert free.labels == ()
    many = [{"prompt": f"p{i}", "answer": str(i)} for i in range(21)]
    assert read(tmp_path, "sums", "s.jsonl", many).labels == ()


def test_outer_blanks_are_no_part_of_a_label(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", "answer": a} for n, a in enumerate(("good ", " bad", "good"))]
    task = read(tmp_path, "mood", "m.jsonl", rows)
    assert task.labels == ("bad", "good") and golds(task) == ["good", "bad", "good"]
    assert correct(task, "Good.", str(task.data.rows[0].answer))
    plain = [{**row, "answer": row["answer"].strip()} for row in rows]
    assert read(tmp_path, "mood", "n.jsonl", plain).data.digest == task.data.digest
    free = [{"prompt": "p", "answer": " one two three four\n"}]
    assert golds(read(tmp_path, "recall", "r.jsonl", free)) == ["one two three four"]


def test_labels_that_differ_in_case_alone_are_rejected(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "answer": answer} for answer in ("Yes", "no", "yes", "NO")]
    with pytest.raises(
        ConfigError, match=r"'NO' and 'no', 'Yes' and 'yes' differ only in their case"
    ):
        read(tmp_path, "own", "o.jsonl", rows)
    many = [{"prompt": f"p{i}", "answer": f"{'aA'[i % 2]}{i // 2}"} for i in range(42)]
    assert read(tmp_path, "free", "f.jsonl", many).labels == (), "free text may"


@pytest.mark.parametrize("value", ["4", "-1", "weather"])
def test_a_column_with_its_own_numbering_takes_no_other(tmp_path: Path, value: str) -> None:
    """4 is Sci/Tech where classes count from 1; the hub's labels are 0 to 3."""
    rows = [{"text": "t", "label": "World"}, {"text": "t", "label": 3}]
    assert golds(read(tmp_path, "ag_news", "h.jsonl", rows)) == ["World", "Sci/Tech"]
    with pytest.raises(ConfigError, match=rf"label of rows 3 \({value}\) is none of ag_news's"):
        read(tmp_path, "ag_news", "h.jsonl", [*rows, {"text": "t", "label": value}])


@pytest.mark.parametrize(
    ("completion", "right"),
    [("Sure, here", True), (" SURE!", True), ("I am not sure.", False), ("Surely", False)],
)
def test_a_task_of_one_label_is_how_a_completion_begins(
    tmp_path: Path, completion: str, right: bool
) -> None:
    task = read(tmp_path, "style", "s.jsonl", [{"prompt": f"p{n}", "answer": "Sure"} for n in "ab"])
    assert task.labels == ("Sure",) and correct(task, completion, "Sure") is right


def test_licence_source_and_digest_are_recorded(tmp_path: Path) -> None:
    one = read(tmp_path, "sst2", "v.tsv", "sentence\tlabel\nfine\t1\n", "?licence=X")
    other = read(tmp_path, "sst2", "w.tsv", "sentence\tlabel\nfine\t0\n")
    assert (one.data.licence, one.data.source) == ("X", "v.tsv?licence=X")
    assert one.data.digest != other.data.digest


@pytest.mark.parametrize(
    ("name", "completion", "gold", "right"),
    [
        ("sst2", "Positive.", "positive", True),
        ("sst2", "It is NEGATIVE, not positive", "positive", False),
        ("sst2", "positively so", "positive", False),
        ("sst2", "", "positive", False),
        ("ag_news", "Sci/Tech", "Sci/Tech", True),
        ("ag_news", "science, or maybe World", "Sci/Tech", True),
        ("ag_news", "worldly", "World", False),
        ("boolq", "True", "yes", True),
        ("boolq", "I know. No!", "no", True),
        ("mnli", "**contradiction**", "contradiction", True),
    ],
)
def test_the_first_label_named_counts(
    tmp_path: Path, name: str, completion: str, gold: str, right: bool
) -> None:
    form = FORMS[name]
    data = read(tmp_path, "x", "x.jsonl", [{"prompt": "p", "answer": "a"}]).data
    assert correct(Task(name, form.labels, data, form.aliases), completion, gold) is right


def test_labels_that_end_in_signs_and_free_text(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "answer": answer} for answer in ("C", "C++")]
    task = read(tmp_path, "lang", "l.jsonl", rows)
    assert correct(task, "It is C++.", "C++") and not correct(task, "It is C++.", "C")
    free = Task("t", (), task.data)
    assert correct(free, " The Answer\n is 4. ", "the answer is 4")
    assert not correct(free, "the answer is 42", "the answer is 4")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "sst2",
            "text\tlabel\na\t1\n",
            "sst2 needs the columns label, sentence; found text, label",
        ),
        ("sst2", "sentence\tlabel\na\t1\nb\t7\n", r"label of rows 2 \(7\) is none of sst2's"),
        ("sst2", "sentence\tlabel\n \t1\n", r"rows \[1\] have no sentence"),
        ("mnli", "premise\thypothesis\tlabel\na\tb\t-\n", "no row has a label"),
        ("own", "prompt\tx\na\tb\n", "rows 1 have no answer"),
    ],
)
def test_errors_name_the_problem(tmp_path: Path, name: str, content: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        read(tmp_path, name, "t.tsv", content)
    assert "--task" in str(caught.value)
