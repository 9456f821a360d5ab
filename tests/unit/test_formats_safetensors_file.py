"""One safetensors file: every way in which it can be wrong, and that good ones are everybody's."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from format_files import f32, safetensors_bytes

from safegene_vllm.errors import HeaderError, MissingFileError, NonFiniteError, TruncatedFileError
from safegene_vllm.formats import safetensors_file
from safegene_vllm.formats.safetensors_file import (
    ANY_BITS,
    check_finite,
    read_safetensors_header,
    read_tensors,
    serialize,
)

GOOD = safetensors_bytes({"a": f32(0, 2), "b": f32(8, 1)}, bytes(12))


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        (safetensors_bytes(b"not json"), HeaderError, "JSON"),
        (safetensors_bytes(b"\xff\xff"), HeaderError, "utf-8"),
        (safetensors_bytes(b"[]"), HeaderError, "found list"),
        (safetensors_bytes(b'{"a": {}, "a": {}}'), HeaderError, "'a' occurs twice"),
        (safetensors_bytes(b'{"a": NaN}'), NonFiniteError, "NaN"),
        (struct.pack("<Q", 2**63) + b"{}", HeaderError, "not a safetensors file"),
        (struct.pack("<Q", 100_000_001) + b"{}", HeaderError, "not a safetensors file"),
        (struct.pack("<Q", 99_999_999) + b"{}", TruncatedFileError, "header alone"),
        (safetensors_bytes({"a": f32(0, 1)}), TruncatedFileError, "promises"),
        (safetensors_bytes({"a": f32(0, 1)}, bytes(5)), TruncatedFileError, "promises"),
        (safetensors_bytes({"a": f32(0, 1) | {"dtype": "I8"}}, bytes(1)), HeaderError, "'I8'"),
        (safetensors_bytes({"a": f32(0, 1) | {"dtype": []}}, bytes(4)), HeaderError, "dtype"),
        (safetensors_bytes({"a": f32(0, 1) | {"shape": [-1]}}, bytes(4)), HeaderError, "shape"),
        (safetensors_bytes({"a": f32(0, 1) | {"shape": [True]}}, bytes(4)), HeaderError, "shape"),
        (
            safetensors_bytes({"a": f32(0, 1) | {"shape": [2]}}, bytes(4)),
            HeaderError,
            "do not hold",
        ),
        (
            safetensors_bytes({"a": f32(0, 1) | {"shape": [2**62, 4]}}, bytes(4)),
            HeaderError,
            "hold",
        ),
        (
            safetensors_bytes({"a": f32(0, 1) | {"data_offsets": [4]}}, bytes(4)),
            HeaderError,
            "hold",
        ),
        (safetensors_bytes({"a": f32(0, 1) | {"more": 1}}, bytes(4)), HeaderError, "exactly"),
        (safetensors_bytes({"a": 1}), HeaderError, "exactly"),
        (safetensors_bytes({"a": f32(0, 2), "b": f32(4, 2)}, bytes(12)), HeaderError, "overlaps"),
        (safetensors_bytes({"a": f32(0, 1), "b": f32(8, 1)}, bytes(12)), HeaderError, "gap"),
        (safetensors_bytes({"a": f32(4, 1)}, bytes(8)), HeaderError, "gap"),
        (safetensors_bytes({"__metadata__": {"a": 1}}), HeaderError, "__metadata__"),
    ],
)
def test_a_bad_file_has_a_named_error(tmp_path: Path, data: bytes, error: type, says: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(error, match=says):
        read_safetensors_header(path)
    with pytest.raises(error, match=says):
        read_tensors(path)


@pytest.mark.parametrize("length", range(len(GOOD)))
def test_a_file_cut_anywhere_is_truncated(tmp_path: Path, length: int) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(GOOD[:length])
    with pytest.raises(TruncatedFileError):
        read_safetensors_header(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="none"):
        read_safetensors_header(tmp_path / "none")


def test_faults_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(safetensors_bytes({"one": 1, "two": 2}))
    with pytest.raises(HeaderError, match=r"(?s)2 faults.*'one'.*'two'"):
        read_safetensors_header(path)


def test_other_dtypes_are_read_where_they_are_allowed(tmp_path: Path) -> None:
    path = tmp_path / "any.safetensors"
    tensors: dict[str, Any] = {
        "f8": torch.zeros(3, dtype=torch.float8_e4m3fn),
        "i8": torch.zeros(3, dtype=torch.int8),
        "flag": torch.zeros(2, dtype=torch.bool),
    }
    safetensors.torch.save_file(tensors, path)
    assert set(read_safetensors_header(path, bits=ANY_BITS)) == set(tensors)
    with pytest.raises(HeaderError, match=r"(?s)3 faults.*F8_E4M3.*I8|I8.*F8_E4M3"):
        read_safetensors_header(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_tensor_that_is_not_finite_is_named(
    tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    path = tmp_path / "nan.safetensors"
    path.write_bytes(
        serialize({"good": torch.ones(2), "bad": torch.tensor([1.0, value]).to(dtype)})
    )
    with pytest.raises(NonFiniteError, match="'bad'"):
        read_tensors(path)


TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a": torch.arange(3, dtype=torch.float16),
    "c": torch.ones(1, 1, dtype=torch.bfloat16),
    "none": torch.empty(0, 4),
    "d": torch.arange(4, dtype=torch.float64).reshape(2, 2).T,
}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def test_what_we_write_the_library_reads_and_the_other_way_round(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.write_bytes(serialize(TENSORS))
    safetensors.torch.save_file({n: t.contiguous() for n, t in TENSORS.items()}, theirs)
    assert same(safetensors.torch.load_file(ours), TENSORS)
    assert same(read_tensors(theirs), TENSORS)
    assert same(read_tensors(ours), TENSORS)


def test_the_order_of_tensors_does_not_change_the_bytes() -> None:
    assert serialize(TENSORS) == serialize(dict(reversed(TENSORS.items())))


def test_tensors_do_not_hang_on_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(serialize(TENSORS))
    tensors = read_tensors(path)
    path.write_bytes(b"")
    assert same(tensors, TENSORS)


FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [float("nan"), float("-nan"), float("inf"), float("-inf")])
def test_nan_and_inf_are_found_without_torch_wherever_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bad: float
) -> None:
    monkeypatch.setattr(safetensors_file, "_CHUNK_BYTES", 16)
    path = tmp_path / "x.safetensors"
    limits = torch.finfo(dtype)
    good = torch.tensor([0.0, -0.0, limits.max, limits.min, limits.tiny, 1.5, -2.0], dtype=dtype)
    tensors = {"a": good, "b": torch.empty(0, dtype=dtype), "c": good.repeat(3).reshape(7, 3)}
    path.write_bytes(serialize(tensors))
    check_finite(path)
    for index in range(21):
        broken = tensors["c"].clone()
        broken.view(-1)[index] = bad
        path.write_bytes(serialize({**tensors, "c": broken}))
        with pytest.raises(NonFiniteError, match="tensor 'c' holds NaN or Inf"):
            check_finite(path)
    path.write_bytes(serialize({**tensors, "a": broken, "c": broken}))
    with pytest.raises(NonFiniteError, match=r"(?s)2 faults:.*'a'.*'c'"):
        check_finite(path)
