"""One safetensors file: every kind of error, and compatibility with the library."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from format_files import f32, safetensors_bytes

from safegene_vllm.errors import HeaderError, MissingFileError, NonFiniteError, TruncatedFileError
from safegene_vllm.formats import safetensors_file
from safegene_vllm.formats.safetensors_file import (
    ADAPTER,
    CHECKPOINT,
    MAX_NAME_CHARS,
    HeaderRules,
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
        (struct.pack("<Q", 2**24 + 1) + b"{}", HeaderError, "not a safetensors file"),
        (struct.pack("<Q", 2**24) + b"{}", TruncatedFileError, "header alone"),
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


@pytest.mark.parametrize(
    ("rules", "dimensions"), [(ADAPTER, 2), (CHECKPOINT, 8)], ids=["adapter", "checkpoint"]
)
def test_a_shape_is_counted_before_it_is_multiplied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rules: HeaderRules, dimensions: int
) -> None:
    path = tmp_path / "file"
    path.write_bytes(safetensors_bytes({"a": f32(0, 1) | {"shape": [1] * dimensions}}, bytes(4)))
    assert read_safetensors_header(path, rules=rules)["a"].shape == (1,) * dimensions

    def multiplied(numbers: list[int]) -> int:
        raise AssertionError(f"{len(numbers)} numbers are multiplied")

    monkeypatch.setattr(safetensors_file.math, "prod", multiplied)
    for shape in ([1] * (dimensions + 1), [2**63 - 1] * 40_000):
        path.write_bytes(safetensors_bytes({"a": f32(0, 1) | {"shape": shape}}, bytes(4)))
        with pytest.raises(HeaderError, match=f"{len(shape)} numbers, expected at most") as caught:
            read_safetensors_header(path, rules=rules)
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (f32(0, 1) | {"shape": [2**63]}, "shape .* is not a list of sizes"),
        (f32(0, 1) | {"data_offsets": [0, 2**63]}, "data_offsets .* is not a list of sizes"),
        (f32(0, 1) | {"data_offsets": [0] * 9000}, "9000 numbers, expected at most 2"),
        (f32(0, 1) | {"shape": "9" * 9000}, "shape .* is not a list of sizes"),
        (f32(0, 1) | {"dtype": "F" * 9000}, "expected one of F64"),
        (f32(0, 1) | {"dtype": [1] * 9000}, "expected one of F64"),
        (f32(0, 1) | {"shape": [10**9000]}, "9001 digits, expected at most 20"),
        ({"x" * 9000: 1}, "expected exactly"),
    ],
)
def test_no_entry_is_too_large_for_its_error(
    tmp_path: Path, entry: dict[str, Any], says: str
) -> None:
    path = tmp_path / "file"
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        path.write_bytes(safetensors_bytes({"a": entry}, bytes(4)))
    finally:
        sys.set_int_max_str_digits(before)
    with pytest.raises(HeaderError, match=says) as caught:
        read_safetensors_header(path)
    assert len(str(caught.value)) < 500


def test_a_name_has_a_longest(tmp_path: Path) -> None:
    path = tmp_path / "file"
    name = "n" * MAX_NAME_CHARS
    path.write_bytes(safetensors_bytes({name: f32(0, 1)}, bytes(4)))
    assert set(read_safetensors_header(path)) == {name}
    path.write_bytes(safetensors_bytes({name + "n": f32(0, 1)}, bytes(4)))
    with pytest.raises(HeaderError, match="a name of 513 characters, expected at most 512"):
        read_safetensors_header(path)


def test_tensors_and_their_errors_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "file"
    few = HeaderRules(ADAPTER.bits, dimensions=2, tensors=30, size_bytes=10_000)
    good = {f"t{n:02}": f32(4 * n, 1) for n in range(30)}
    path.write_bytes(safetensors_bytes({**good, "__metadata__": {"format": "pt"}}, bytes(120)))
    assert set(read_safetensors_header(path, rules=few)) == set(good)
    path.write_bytes(safetensors_bytes({**good, "u": f32(120, 1), "v": f32(124, 1)}, bytes(128)))
    with pytest.raises(HeaderError, match="more values than 30 tensors have"):
        read_safetensors_header(path, rules=few)
    path.write_bytes(safetensors_bytes(dict.fromkeys(good, 1)))
    with pytest.raises(HeaderError, match=r"(?s)30 errors.*'t02'.*and 27 more like") as caught:
        read_safetensors_header(path, rules=few)
    assert str(caught.value).count("expected exactly") == 3


@pytest.mark.parametrize("inside", ["[]", "0", "{}", '"":0'])
def test_a_header_of_too_many_values_is_not_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    few = HeaderRules(ADAPTER.bits, dimensions=2, tensors=30, size_bytes=10_000)
    many = ",".join([inside] * 700)
    header = f'{{"a":{{{many}}}}}' if ":" in inside else f'{{"a":[{many}]}}'
    path = tmp_path / "file"
    path.write_bytes(safetensors_bytes(header.encode()))

    def parsed(*_: object) -> None:
        raise AssertionError("the header was parsed")

    monkeypatch.setattr(safetensors_file, "parse_json", parsed)
    with pytest.raises(HeaderError, match="more values than 30 tensors have"):
        read_safetensors_header(path, rules=few)


@pytest.mark.parametrize("length", range(len(GOOD)))
def test_a_file_cut_anywhere_is_truncated(tmp_path: Path, length: int) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(GOOD[:length])
    with pytest.raises(TruncatedFileError):
        read_safetensors_header(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="none"):
        read_safetensors_header(tmp_path / "none")


def test_errors_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(safetensors_bytes({"one": 1, "two": 2}))
    with pytest.raises(HeaderError, match=r"(?s)2 errors.*'one'.*'two'"):
        read_safetensors_header(path)


def test_other_dtypes_are_read_where_they_are_allowed(tmp_path: Path) -> None:
    path = tmp_path / "any.safetensors"
    tensors: dict[str, Any] = {
        "f8": torch.zeros(3, dtype=torch.float8_e4m3fn),
        "i8": torch.zeros(3, dtype=torch.int8),
        "flag": torch.zeros(2, dtype=torch.bool),
    }
    safetensors.torch.save_file(tensors, path)
    assert set(read_safetensors_header(path, rules=CHECKPOINT)) == set(tensors)
    with pytest.raises(HeaderError, match=r"(?s)3 errors.*F8_E4M3.*I8|I8.*F8_E4M3"):
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
    with pytest.raises(NonFiniteError, match=r"(?s)2 errors:.*'a'.*'c'"):
        check_finite(path)
