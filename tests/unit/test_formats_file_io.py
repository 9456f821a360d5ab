"""JSON is read strictly and written one way; files and directories whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from safegene_vllm.errors import FormatError, HeaderError, MissingFileError, NonFiniteError
from safegene_vllm.formats import file_io


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        (b"", HeaderError, "one JSON object"),
        (b'{"a": 1', HeaderError, "one JSON object"),
        (b'{"a": 1} x', HeaderError, "one JSON object"),
        (b"[1]", HeaderError, "found list"),
        (b"\xff\xfe{}", HeaderError, "utf-8"),
        ('{"a": 1}'.encode("utf-16"), HeaderError, "utf-8"),
        (b'{"a": 1, "a": 2}', HeaderError, "'a' occurs twice"),
        (b'{"b": {"a": 1, "a": 1}}', HeaderError, "'a' occurs twice"),
        (b'{"a": NaN}', NonFiniteError, "NaN"),
        (b'{"a": -Infinity}', NonFiniteError, "Infinity"),
        (b'{"a": 1e999}', NonFiniteError, "1e999"),
        (b'{"a": ' + b"9" * 400 + b"}", HeaderError, "400 digits"),
        (b"[" * 100_000, HeaderError, "one JSON object"),
    ],
)
def test_json_that_is_not_strict_is_rejected(data: bytes, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        file_io.parse_json(data, "here")


def test_a_json_file_over_the_limit_is_rejected_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_io, "JSON_LIMIT_BYTES", 10)
    (tmp_path / "big.json").write_text('{"a": "long enough"}')
    with pytest.raises(HeaderError, match="20 bytes, expected at most 10"):
        file_io.read_json(tmp_path / "big.json")


def test_what_is_not_a_regular_file_is_missing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("none", "pipe", "dangling", "."):
        with pytest.raises(MissingFileError):
            file_io.read_json(tmp_path / name)


def test_canonical_json_is_sorted_dense_ascii() -> None:
    value = {"b": [1, 1.0, 1e-7, None, True], "a": {"é": "ü"}}
    expected = b'{"a":{"\\u00e9":"\\u00fc"},"b":[1,1.0,1e-07,null,true]}'
    assert file_io.canonical_json(value, "here") == expected


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ({"a": float("nan")}, NonFiniteError),
        ({"a": {1}}, HeaderError),
        ({1: 0, "a": 0}, HeaderError),
    ],
)
def test_values_outside_json_are_rejected(value: Any, error: type) -> None:
    with pytest.raises(error):
        file_io.canonical_json(value, "here")


def fail(*_: Any, **__: Any) -> None:
    raise OSError("no space left on device")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    file_io.replace_file(path, b"old")
    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
            patch.setattr(os, step, fail)
            file_io.replace_file(path, b"new")
        assert [p.name for p in tmp_path.iterdir()] == ["file"]
        assert path.read_bytes() == b"old"


@pytest.mark.parametrize("step", ["fsync", "replace", "rename"])
def test_a_failed_swap_leaves_the_old_directory_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "dir"
    file_io.replace_directory(path, {"a": b"1", "b": b"2"}, owned=["a", "b"])
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(os, step, fail)
        file_io.replace_directory(path, {"a": b"3"}, owned=["a", "b"])
    assert [p.name for p in tmp_path.iterdir()] == ["dir"]
    assert {p.name: p.read_bytes() for p in path.iterdir()} == {"a": b"1", "b": b"2"}


def test_a_failed_first_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        file_io.replace_directory(tmp_path / "dir", {"a": b"1"}, owned=["a"])
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_never_written_through_a_link(tmp_path: Path) -> None:
    blob, link = tmp_path / "blobs" / "ab", tmp_path / "snapshot" / "safegene.json"
    blob.parent.mkdir()
    link.parent.mkdir()
    blob.write_bytes(b"shared")
    link.symlink_to("../blobs/ab")
    file_io.replace_file(link, b"own")
    assert blob.read_bytes() == b"shared"
    assert link.read_bytes() == b"own" and not link.is_symlink()
    (tmp_path / "link").symlink_to(link.parent)
    file_io.replace_file(tmp_path / "link" / "safegene.json", b"new")
    assert link.read_bytes() == b"new" and (tmp_path / "link").is_symlink()


def test_a_directory_is_replaced_as_a_whole_through_a_link_too(tmp_path: Path) -> None:
    path, link = tmp_path / "dir", tmp_path / "link"
    file_io.replace_directory(path, {"a": b"1", "b": b"2"}, owned=["a", "b"])
    link.symlink_to(path)
    file_io.replace_directory(link, {"a": b"3"}, owned=["a", "b"])
    assert link.is_symlink()
    assert {p.name: p.read_bytes() for p in path.iterdir()} == {"a": b"3"}


def test_a_directory_with_files_of_others_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FormatError, match=r"thesis\.tex.*new directory"):
        file_io.replace_directory(tmp_path, {"a": b"1"}, owned=["a"])
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(FormatError, match="is a file"):
        file_io.replace_directory(tmp_path / "thesis.tex", {"a": b"1"}, owned=["a"])
