"""Prompts, answers and labels from CSV, TSV, JSONL, JSON or a Hugging Face data set. Torch-free.

Data sources are written `PATH?key=value&key=value`, percent-decoded (%20 a space, %26 an
ampersand). Reserved keys: prompt=COLUMN, answer=COLUMN, licence=TEXT, limit=N, header=col1,col2,
part=train|held-out (prompt_sketch); others select the rows whose COLUMN is VALUE. A name owner/name
that is no file, or `hf:NAME[:CONFIG[:SPLIT]]`, is read with the optional package `datasets`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from safegene_vllm.errors import ConfigError, FormatError, SafegeneError, raise_errors
from safegene_vllm.formats.file_io import canonical_json, parse_json, size_of_regular_file
from safegene_vllm.prompt_sketch import PARTS, part_of, sketch

PROMPT_COLUMNS = ("prompt", "goal", "instruction", "question", "sentence", "text", "description")
TEXT_COLUMNS = ("answer", "response", "output")
ANSWER_COLUMNS = (*TEXT_COLUMNS, "label", "category")
"""Tried in this order. Never `target`: in AdvBench's own file that column opens harmful answers."""

LICENSE_COLUMNS = ("licence", "license")
RESERVED_KEYS = ("prompt", "answer", "licence", "limit", "header", "part")
_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SHOWN = 8


@dataclass(frozen=True)
class Row:
    """A prompt; `answer` is its reference text or label, None if the data has none."""

    prompt: str
    answer: str | None


@dataclass(frozen=True)
class Dataset:
    """Rows in order; `source` is the file name with its query, without its directory."""

    name: str
    rows: tuple[Row, ...]
    licence: str | None
    digest: str
    source: str

    def record(self) -> dict[str, Any]:
        """The data as a recipe or a calibration records it; of the prompts only digests."""
        return {
            "name": self.name,
            "rows": len(self.rows),
            "licence": self.licence,
            "sha256": self.digest.removeprefix("sha256:"),
            "prompts": sketch(row.prompt for row in self.rows),
        }


@dataclass(frozen=True)
class Table:
    """Raw rows, filtered and limited, with their numbers in the file (from 1)."""

    label: str
    name: str
    source: str
    columns: tuple[str, ...]
    rows: tuple[tuple[int, Mapping[str, Any]], ...]
    options: Mapping[str, str]


def digest_of_rows(rows: Iterable[Row]) -> str:
    """`sha256:<hex>` over one line of canonical JSON `[prompt, answer]` per row, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(canonical_json([row.prompt, row.answer], "rows") + b"\n")
    return "sha256:" + digest.hexdigest()


def _shorten(values: Sequence[Any]) -> str:
    shown = ", ".join(str(value) for value in values[:_SHOWN])
    return shown + (f", ... ({len(values)} in all)" if len(values) > _SHOWN else "")


def split_source(source: str | Path, *, what: str = "data") -> tuple[str, dict[str, str]]:
    """Split `source` into path and query. Errors: ConfigError naming the bad part."""
    path, mark, query = str(source).partition("?")
    options: dict[str, str] = {}
    errors: list[SafegeneError] = []
    for part in query.split("&") if mark else []:
        key, equals, value = part.partition("=")
        key = unquote(key)
        if not key or not equals:
            errors.append(ConfigError(f"{what} {source}: {part!r} is not key=value"))
        elif key in options:
            errors.append(ConfigError(f"{what} {source}: {key} is given twice; keep one of them"))
        options[key] = unquote(value)
    if not path:
        errors.append(ConfigError(f"{what} {str(source)!r}: no path before the '?'"))
    limit = options.get("limit", "1")
    if not limit.isdecimal() or int(limit) < 1:
        errors.append(
            ConfigError(
                f"{what} {source}: limit is {limit!r}, expected a number of rows, 1 or more"
            )
        )
    if options.get("part", PARTS[0]) not in PARTS:
        errors.append(
            ConfigError(
                f"{what} {source}: part is {options['part']!r}, expected {' or '.join(PARTS)}"
            )
        )
    raise_errors(errors)
    return path, options


def _delimited(
    text: str, header: Sequence[str] | None, delimiter: str, label: str
) -> tuple[list[str], list[dict[str, Any]]]:
    # TSV has no quoting: in SST-2 and its like a quotation mark is part of the sentence.
    file = io.StringIO(text, newline="")
    reader = (
        csv.reader(file, delimiter=delimiter, quoting=csv.QUOTE_NONE)
        if delimiter == "\t"
        else csv.reader(file, delimiter=delimiter, strict=True)
    )
    try:
        records = [record for record in reader if record]
    except csv.Error as error:
        raise ConfigError(f"{label}: line {reader.line_num} cannot be read: {error}") from error
    columns = list(header) if header is not None else (records.pop(0) if records else [])
    duplicates = sorted({column for column in columns if columns.count(column) > 1})
    if duplicates:
        raise ConfigError(f"{label}: the header names {_shorten(duplicates)} twice")
    wrong = [i for i, record in enumerate(records, 1) if len(record) != len(columns)]
    if wrong:
        found = len(records[wrong[0] - 1])
        raise ConfigError(
            f"{label}: rows {_shorten(wrong)} do not have {len(columns)} fields like the header "
            f"{columns} (row {wrong[0]} has {found}); quote fields that hold the delimiter, or "
            "name the columns of a file without a header by ?header=col1,col2"
        )
    return columns, [dict(zip(columns, record, strict=True)) for record in records]


def _objects(text: str, suffix: str, label: str) -> list[dict[str, Any]]:
    if suffix == ".json":
        whole = parse_json(f'{{"rows":{text}}}'.encode(), label)
        rows = whole["rows"]
        if set(whole) != {"rows"} or not isinstance(rows, list):
            raise ConfigError(f"{label}: expected a JSON list of objects")
    else:
        rows = [
            parse_json(line.encode(), f"{label}, line {number}")
            for number, line in enumerate(text.split("\n"), 1)
            if line.strip()
        ]
    wrong = [number for number, row in enumerate(rows, 1) if not isinstance(row, dict)]
    if wrong:
        raise ConfigError(f"{label}: rows {_shorten(wrong)} are not JSON objects")
    return rows


def _columns_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in row))


def _read_file(
    path: Path, header: Sequence[str] | None, label: str
) -> tuple[list[str], list[dict[str, Any]]]:
    try:
        size_of_regular_file(path)
    except FormatError as error:
        raise type(error)(f"{label}: {error}") from error
    if path.suffix not in _SUFFIXES:
        raise ConfigError(f"{label}: the file name ends in none of {', '.join(_SUFFIXES)}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{label}: the file is not UTF-8 ({error}); convert it") from error
    if path.suffix in (".csv", ".tsv"):
        return _delimited(text, header, "," if path.suffix == ".csv" else "\t", label)
    if header is not None:
        raise ConfigError(f"{label}: header= is for CSV and TSV; rows of JSON have their own names")
    rows = _objects(text, path.suffix, label)
    return _columns_of(rows), rows


def _read_hub(name: str, label: str) -> tuple[list[str], list[dict[str, Any]]]:
    repository, _, rest = name.removeprefix("hf:").partition(":")
    config, _, split = rest.partition(":")
    try:
        import datasets  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise ConfigError(
            f"{label}: no such file, and reading {repository!r} from the Hugging Face Hub needs "
            "the package datasets: pip install datasets (or name a file)"
        ) from error
    try:
        loaded = datasets.load_dataset(repository, config or None, split=split or None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{label}: datasets cannot load {repository!r}: {error}") from error
    if isinstance(loaded, Mapping):
        if len(loaded) != 1:
            raise ConfigError(
                f"{label}: {repository!r} has the splits {_shorten(sorted(loaded))}; name one: "
                f"hf:{repository}:{config}:SPLIT"
            )
        loaded = next(iter(loaded.values()))
    rows = [dict(row) for row in loaded]
    return _columns_of(rows), rows


def _filtered(
    rows: Iterable[tuple[int, Mapping[str, Any]]],
    filters: Mapping[str, str],
    columns: Sequence[str],
    label: str,
) -> list[tuple[int, Mapping[str, Any]]]:
    unknown = [column for column in filters if column not in columns]
    if unknown:
        raise ConfigError(
            f"{label}: no column {_shorten(unknown)} to filter by; columns found: "
            f"{_shorten(columns)} (reserved keys: {', '.join(RESERVED_KEYS)})"
        )
    found = list(rows)
    for column, wanted in filters.items():
        values = list(dict.fromkeys(str(row.get(column)) for _, row in found))
        found = [(number, row) for number, row in found if str(row.get(column)) == wanted]
        if not found:
            raise ConfigError(
                f"{label}: no row has {column}={wanted}; values found: {_shorten(values)}"
            )
    return found


def read_table(
    source: str | Path, *, header: Sequence[str] | None = None, what: str = "data"
) -> Table:
    """The raw rows of `source`, after its filters and its limit (a `part=` is chosen before it).

    `header` names the columns of a file that has none, unless the source does.
    Errors: MissingFileError; ConfigError naming `what`, the source and what was found; HeaderError
    or NonFiniteError for broken JSON.
    """
    path, options = split_source(source, what=what)
    label = f"{what} {path}"
    if "header" in options:
        header = options["header"].split(",")
    is_file = not path.startswith("hf:") and (
        Path(path).exists() or Path(path).suffix in _SUFFIXES or _HUB_NAME.fullmatch(path) is None
    )
    columns, rows = _read_file(Path(path), header, label) if is_file else _read_hub(path, label)
    if not rows:
        raise ConfigError(f"{label}: the data has no rows")
    filters = {key: value for key, value in options.items() if key not in RESERVED_KEYS}
    found = _filtered(enumerate(rows, 1), filters, columns, label)
    name = Path(path).name if is_file else path.removeprefix("hf:")
    _, mark, query = str(source).partition("?")
    return Table(
        label=label,
        name=name,
        source=f"{name}{mark}{query}",
        columns=tuple(columns),
        rows=tuple(found[: None if "part" in options else int(options.get("limit", len(found)))]),
        options=options,
    )


def license_of(table: Table, *, need: bool = False) -> str | None:
    """License: `licence=` of the source, else all values of the rows' license field, else None.

    Errors: ConfigError if one is needed and any row has none.
    """
    if table.options.get("licence"):
        return table.options["licence"]
    column = next((name for name in LICENSE_COLUMNS if name in table.columns), None)
    missing = [number for number, row in table.rows if not (column and row.get(column))]
    if column and not missing:
        return ", ".join(dict.fromkeys(str(row[column]) for _, row in table.rows))
    if need:
        found = (
            f"rows {_shorten(missing)} have no {column}"
            if column
            else f"there is no licence= in the source and no column {' or '.join(LICENSE_COLUMNS)}"
        )
        raise ConfigError(
            f"{table.label}: the license of the data is unknown: {found}; add for example "
            "?licence=MIT to the source; the license is written into the record"
        )
    return None


def as_dataset(table: Table, rows: Sequence[Row], *, need_license: bool = False) -> Dataset:
    """`rows` made from a table, with its name, license and digest; only those of its `part=`."""
    licence = license_of(table, need=need_license)
    if part := table.options.get("part"):
        rows = [row for row in rows if part_of(row.prompt) == part]
        rows = rows[: int(table.options.get("limit", len(rows)))]
        if not rows:
            raise ConfigError(f"{table.label}: no row is in the part {part!r}; give more rows")
    return Dataset(table.name, tuple(rows), licence, digest_of_rows(rows), table.source)


def _column(table: Table, key: str, usual: Sequence[str]) -> str | None:
    """The column that the source names by `key`, else the first of the `usual` ones."""
    named = table.options.get(key)
    if named is None:
        return next((name for name in usual if name in table.columns), None)
    if named not in table.columns:
        raise ConfigError(
            f"{table.label}: no column {named!r} for {key}=; columns found: "
            f"{_shorten(table.columns)}"
        )
    return named


def _first_instance(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row, or the first instance of a self-instruct row, with input and output."""
    instances = row.get("instances")
    if isinstance(instances, list) and instances and isinstance(instances[0], dict):
        return instances[0]
    return row


def _texts(table: Table, prompt: str, answer: str | None) -> Iterator[tuple[int, Any, Any]]:
    for number, row in table.rows:
        text, given = row.get(prompt), row.get(answer) if answer else None
        if prompt == "instruction":
            instance = _first_instance(row)
            extra = instance.get("input")
            if isinstance(text, str) and isinstance(extra, str) and extra.strip():
                text = f"{text}\n\n{extra}"
            if instance is not row and "answer" not in table.options:
                given = instance.get("output")
        yield number, text, given


def read_dataset(
    source: str | Path,
    *,
    need_answers: bool = False,
    need_license: bool = False,
    labels: bool = True,
    what: str = "data",
) -> Dataset:
    """Prompts of `source`, with answers if it has any; duplicates stay.

    The prompt column is the source's `prompt=` or the first of PROMPT_COLUMNS, the answer's
    `answer=` or the first of ANSWER_COLUMNS (`labels=False`: of TEXT_COLUMNS). An `input` is
    appended to its `instruction`; self-instruct's `instances[0]` supplies input and output.
    `what` begins every message.
    Errors: those of `read_table`; ConfigError naming columns, rows, values or the missing license.
    """
    table = read_table(source, what=what)
    prompt = _column(table, "prompt", PROMPT_COLUMNS)
    usual = ANSWER_COLUMNS if labels else TEXT_COLUMNS
    answer = _column(table, "answer", [c for c in usual if c != prompt])
    if prompt is None:
        raise ConfigError(
            f"{table.label}: no column of {_shorten(table.columns)} is known to hold prompts "
            f"({', '.join(PROMPT_COLUMNS)}); name it: ?prompt=COLUMN"
        )
    rows: list[Row] = []
    without: dict[str, list[int]] = {"prompt": [], "answer": []}
    for number, text, given in _texts(table, prompt, answer):
        if not isinstance(text, str) or not text.strip():
            without["prompt"].append(number)
        if isinstance(given, dict | list):
            raise ConfigError(
                f"{table.label}: row {number} has a {type(given).__name__} as its answer, expected "
                "text; name another column: ?answer=COLUMN"
            )
        if given is None or given == "":
            without["answer"].append(number)
        rows.append(Row(str(text), None if given is None or given == "" else str(given)))
    errors: list[SafegeneError] = []
    if without["prompt"]:
        errors.append(
            ConfigError(
                f"{table.label}: rows {_shorten(without['prompt'])} have no text in column "
                f"{prompt!r}; leave them out or name another column by ?prompt="
            )
        )
    if need_answers and without["answer"]:
        where = f"in column {answer!r}" if answer else f"(columns: {_shorten(table.columns)})"
        errors.append(
            ConfigError(
                f"{table.label}: rows {_shorten(without['answer'])} have no answer {where}; name "
                "the column by ?answer=COLUMN"
            )
        )
    raise_errors(errors)
    return as_dataset(table, rows, need_license=need_license)
