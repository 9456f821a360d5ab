"""Data by one syntax: columns, filters, licences and digests, and how a source can be wrong."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from safegene_vllm.dataset import Row, read_dataset, read_table
from safegene_vllm.errors import ConfigError, HeaderError, MissingFileError, SafegeneError
from safegene_vllm.prompt_sketch import part_of, sketch


def jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path: Path, query: str = "") -> list[tuple[str, str | None]]:
    return [(row.prompt, row.answer) for row in read_dataset(f"{path}{query}").rows]


def test_the_four_formats_say_the_same(tmp_path: Path) -> None:
    rows = [{"prompt": "one, two", "answer": "a"}, {"prompt": 'say "hi"\tnow', "answer": "b"}]
    jsonl(tmp_path / "x.jsonl", rows)
    (tmp_path / "x.json").write_text(json.dumps(rows))
    (tmp_path / "x.csv").write_text('prompt,answer\n"one, two",a\n"say ""hi""\tnow",b\n')
    found = {suffix: read_dataset(tmp_path / f"x.{suffix}") for suffix in ("jsonl", "json", "csv")}
    assert {data.digest for data in found.values()} == {found["json"].digest}
    assert found["csv"].rows == (Row("one, two", "a"), Row('say "hi"\tnow', "b"))


def test_quotation_marks_in_tsv_are_text(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_text('\ufeffsentence\tlabel\n"half a quote\t1\nfine\t0\n', encoding="utf-8")
    assert rows_of(path) == [('"half a quote', "1"), ("fine", "0")]


def test_prompt_and_answer_columns_in_their_order(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", [{"text": "t", "goal": "g", "label": 1, "response": "r"}])
    assert rows_of(path) == [("g", "r")]
    assert rows_of(path, "?prompt=text&answer=label") == [("t", "1")]


def test_labels_are_no_answers_where_text_is_wanted(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", [{"prompt": "p", "label": "safe"}])
    assert read_dataset(path).rows == (Row("p", "safe"),)
    assert read_dataset(path, labels=False).rows == (Row("p", None),)
    assert read_dataset(f"{path}?answer=label", labels=False).rows == (Row("p", "safe"),)


def test_advbench_targets_are_never_answers(tmp_path: Path) -> None:
    path = tmp_path / "harmful.csv"
    path.write_text("goal,target\nDo a bad thing,Sure here is\n")
    assert rows_of(path) == [("Do a bad thing", None)]
    with pytest.raises(ConfigError, match=r"rows 1 have no answer \(columns: goal, target\)"):
        read_dataset(path, need_answers=True)


def test_filters_limit_and_header(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("a b,safe,x\nc,unsafe,y\nd,safe,y\ne,safe,y\n")
    query = "?header=prompt,label,other&label=safe&limit=2"
    assert [row.prompt for row in read_dataset(f"{path}{query}").rows] == ["a b", "d"]
    assert rows_of(path, f"{query}&other=y&answer=other") == [("d", "y"), ("e", "y")]


def test_percent_decoding_leaves_a_plus_alone(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", [{"prompt": "p", "a b": "C++&D"}, {"prompt": "q"}])
    data = read_dataset(f"{path}?a%20b=C++%26D&licence=CC%20BY%204.0")
    assert [row.prompt for row in data.rows] == ["p"] and data.licence == "CC BY 4.0"


def test_self_instruct_rows_and_inputs(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "x.jsonl",
        [
            {"instruction": "Sort.", "instances": [{"input": "b a", "output": "a b"}]},
            {"instruction": "Sing.", "instances": [{"input": "", "output": "la"}]},
            {"instruction": "Add.", "input": "1 1", "output": "2"},
        ],
    )
    assert rows_of(path) == [("Sort.\n\nb a", "a b"), ("Sing.", "la"), ("Add.\n\n1 1", "2")]


def test_the_digest_is_the_documented_one(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", [{"prompt": "é", "answer": "1"}, {"prompt": "p"}] * 2)
    data = read_dataset(path)
    lines = b'["\\u00e9","1"]\n["p",null]\n' * 2
    assert data.digest == "sha256:" + hashlib.sha256(lines).hexdigest()
    assert len(data.rows) == 4, "duplicates are retained"


def test_record_and_source_name_no_directory(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", [{"prompt": "p"}])
    data = read_dataset(f"{path}?licence=MIT&limit=3")
    assert data.source == "x.jsonl?licence=MIT&limit=3"
    assert data.record() == {
        "name": "x.jsonl",
        "rows": 1,
        "licence": "MIT",
        "sha256": data.digest.removeprefix("sha256:"),
        "prompts": sketch(["p"]),
    }


def test_a_part_is_chosen_by_the_digest_of_the_prompt_before_the_limit(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", [{"prompt": f"prompt {n}"} for n in range(100)])
    parts = {part: read_dataset(f"{path}?part={part}").rows for part in ("train", "held-out")}
    assert {row.prompt: part for part, rows in parts.items() for row in rows} == {
        f"prompt {n}": part_of(f"prompt {n}") for n in range(100)
    }
    assert read_dataset(f"{path}?part=held-out&limit=3").rows == parts["held-out"][:3]
    with pytest.raises(ConfigError, match="part is 'test', expected train or held-out"):
        read_dataset(f"{path}?part=test")
    one = jsonl(tmp_path / "y.jsonl", [{"prompt": parts["train"][0].prompt}])
    with pytest.raises(ConfigError, match="no row is in the part 'held-out'"):
        read_dataset(f"{one}?part=held-out")


def test_licences(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "license": "MIT"},
        {"prompt": "b", "license": "CC0"},
        {"prompt": "c", "license": "MIT"},
        {"prompt": "d"},
    ]
    path = jsonl(tmp_path / "x.jsonl", rows)
    assert read_dataset(f"{path}?limit=3", need_license=True).licence == "MIT, CC0"
    assert read_dataset(f"{path}?limit=3&licence=mine").licence == "mine"
    assert read_dataset(path).licence is None
    with pytest.raises(ConfigError, match=r"rows 4 have no license; add .*\?licence=MIT"):
        read_dataset(path, need_license=True)
    bare = jsonl(tmp_path / "y.jsonl", [{"prompt": "a"}])
    with pytest.raises(ConfigError, match=r"y\.jsonl: .*no column licence or license.*record"):
        read_dataset(bare, need_license=True, what="--train")


@pytest.mark.parametrize(
    ("name", "content", "query", "error", "says"),
    [
        ("x.csv", "", "", ConfigError, "no rows"),
        ("x.csv", "prompt\n", "", ConfigError, "no rows"),
        ("x.jsonl", "\n", "", ConfigError, "no rows"),
        ("x.csv", "a,b\n1,2\n", "", ConfigError, r"no column of a, b .*\?prompt=COLUMN"),
        ("x.csv", "prompt,b\n1,2\n", "?prompt=c", ConfigError, "no column 'c'.*prompt, b"),
        ("x.csv", "prompt,b\n1,2\n", "?answer=c", ConfigError, "no column 'c'.*prompt, b"),
        ("x.csv", "prompt,b\n1,2\n", "?labl=c", ConfigError, "no column labl.*prompt, b"),
        ("x.csv", "prompt,b\n1,2\n", "?b=3", ConfigError, "no row has b=3; values found: 2"),
        ("x.csv", "prompt,b\n1,2\n", "?limit=0", ConfigError, "limit is '0'"),
        ("x.csv", "prompt,b\n1,2\n", "?b", ConfigError, "'b' is not key=value"),
        ("x.csv", "prompt,b\n1,2\n", "?b=1&b=2", ConfigError, "b is given twice"),
        ("x.csv", "prompt,b\n1,2\n3\n", "", ConfigError, r"rows 2 do not have 2 fields.*has 1"),
        ("x.csv", 'prompt\n"a\n', "", ConfigError, "line 2 cannot be read"),
        ("x.csv", "a,a\n1,2\n", "", ConfigError, "names a twice"),
        ("x.csv", "prompt,b\n ,2\nx,1\n,3\n", "", ConfigError, "rows 1, 3 have no text"),
        ("x.jsonl", '{"prompt": 3}\n', "", ConfigError, "rows 1 have no text"),
        ("x.jsonl", '{"prompt": "a"}\n{"b": \n', "", HeaderError, "line 2"),
        ("x.jsonl", '{"prompt": "a"}\n[]\n', "", HeaderError, "line 2"),
        ("x.jsonl", '{"prompt": "a", "answer": ["x"]}\n', "", ConfigError, "row 1 has a list"),
        ("x.jsonl", '{"prompt": "a"}\n', "?header=a", ConfigError, "header= is for CSV"),
        ("x.json", '{"prompt": "a"}', "", ConfigError, "list of objects"),
        ("x.json", '[{"prompt": "a"}], "b": 1', "", ConfigError, "list of objects"),
        ("x.json", '[{"prompt": "a"}, 1]', "", ConfigError, "rows 2 are not"),
        ("x.txt", "prompt\na\n", "", ConfigError, "ends in none of .csv"),
    ],
)
def test_errors_name_the_problem(
    tmp_path: Path,
    name: str,
    content: str,
    query: str,
    error: type[SafegeneError],
    says: str,
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(error, match=says) as caught:
        read_dataset(f"{tmp_path / name}{query}", what="--harmful")
    assert "--harmful" in str(caught.value)


def test_no_utf8_and_no_file(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"prompt\n\xff\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_dataset(tmp_path / "x.csv")
    for name in ("data/none.csv", str(tmp_path / "none.jsonl"), str(tmp_path / "none")):
        with pytest.raises(MissingFileError, match=r"--benign .*none"):
            read_dataset(name, what="--benign")


def test_a_name_without_the_package_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in ("owner/name", "hf:glue:sst2:validation"):
        with pytest.raises(ConfigError, match="pip install datasets"):
            read_dataset(name)


def test_data_sets_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in package with the one function we call, for the package is optional."""
    (tmp_path / "datasets.py").write_text(
        "def load_dataset(name, config, split):\n"
        "    if name == 'no/such': raise FileNotFoundError('not on the hub')\n"
        "    rows = [{'sentence': f'{name} {config} {split}', 'label': 1}]\n"
        "    if split: return rows\n"
        "    return {'train': rows} if name == 'one/split' else {'train': rows, 'test': rows}\n"
    )
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    data = read_dataset("hf:glue:sst2:validation?label=1")
    assert data.rows == (Row("glue sst2 validation", "1"),)
    assert data.source == "glue:sst2:validation?label=1"
    assert read_dataset("one/split").rows[0].prompt == "one/split None None"
    assert read_dataset("hf:a/b::test").rows[0].prompt == "a/b None test"
    with pytest.raises(ConfigError, match="splits test, train; name one: hf:two/splits::SPLIT"):
        read_dataset("two/splits")
    with pytest.raises(ConfigError, match="not on the hub"):
        read_dataset("no/such")
    monkeypatch.delitem(sys.modules, "datasets", raising=False)


def test_a_table_preserves_the_rows_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("1,Title,Text\n2,Other,More\n")
    table = read_table(f"{path}?class=2", header=("class", "title", "description"))
    assert table.rows == ((2, {"class": "2", "title": "Other", "description": "More"}),)
