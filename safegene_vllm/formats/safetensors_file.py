"""One safetensors file: its header checked before anything is allocated, then its tensors.

Reading a header is torch-free. Nothing here knows what the tensors are for.
Format: https://huggingface.co/docs/safetensors (8-byte length, JSON header, packed data).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from safegene_vllm.errors import (
    HeaderError,
    NonFiniteError,
    SafegeneError,
    TruncatedFileError,
    raise_errors,
)
from safegene_vllm.formats.file_io import canonical_json, parse_json, size_of_regular_file

if TYPE_CHECKING:
    import torch

FLOAT_BITS: Mapping[str, int] = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16}
ANY_BITS: Mapping[str, int] = {
    **FLOAT_BITS,
    **{"I64": 64, "U64": 64, "C64": 64, "I32": 32, "U32": 32, "I16": 16, "U16": 16},
    **{"I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8},
    **{"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4},
}
"""What a base checkpoint may hold; adapters may hold FLOAT_BITS only."""
MAX_NAME_CHARS = 512
"""Of a tensor. The longest of the Hugging Face hub's models have about 150."""
MAX_SIZE = 2**63 - 1
"""Of a dimension or an offset: what the safetensors library reads."""

# The bits of the exponent, all ones in NaN and Inf and in no other value.
_EXPONENTS: Mapping[str, tuple[str, int]] = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}
_CHUNK_BYTES = 1 << 22

_TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class HeaderRules:
    """What a header may hold: dtypes with bits per element, and how much of everything."""

    bits: Mapping[str, int]
    dimensions: int
    tensors: int
    size_bytes: int


ADAPTER = HeaderRules(FLOAT_BITS, dimensions=2, tensors=100_000, size_bytes=16 << 20)
"""Pairs of matrices on every expert of 60 layers of 256 experts are 93,000 tensors; each takes
about 160 bytes of header. A dense model of 80 layers has 1,100."""
CHECKPOINT = HeaderRules(ANY_BITS, dimensions=8, tensors=1_000_000, size_bytes=100_000_000)
"""The safetensors library's own limit of the header."""
_MARKS_PER_TENSOR = 20
"""Brackets, colons and commas of one entry: at most 18, in eight dimensions."""


@dataclass(frozen=True)
class TensorInfo:
    """One entry of a header; `begin` and `end` are bytes from the start of the data section."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _entry(name: str, value: Any, rules: HeaderRules) -> TensorInfo:
    """The checked entry `name`; HeaderError if it is not one of ours."""
    if len(name) > MAX_NAME_CHARS:
        raise HeaderError(
            f"tensor {name[:100]!r}... has a name of {len(name)} characters, expected at most "
            f"{MAX_NAME_CHARS}"
        )
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise HeaderError(f"tensor {name!r}: expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in rules.bits:
        raise HeaderError(
            f"tensor {name!r} has dtype {dtype!r:.40}, expected one of {', '.join(rules.bits)}"
        )
    # Counted before anything is multiplied: a product of thousands of numbers takes minutes.
    for what, numbers, most in (("shape", shape, rules.dimensions), ("data_offsets", offsets, 2)):
        if not isinstance(numbers, list):
            raise HeaderError(f"tensor {name!r}: {what} {numbers!r:.40} is not a list of sizes")
        if len(numbers) > most:
            raise HeaderError(
                f"tensor {name!r}: {what} has {len(numbers)} numbers, expected at most {most}"
            )
        if any(type(n) is not int or not 0 <= n <= MAX_SIZE for n in numbers):
            raise HeaderError(f"tensor {name!r}: {what} {numbers!r:.200} is not a list of sizes")
    if len(offsets) != 2 or 8 * (offsets[1] - offsets[0]) != math.prod(shape) * rules.bits[dtype]:
        raise HeaderError(
            f"tensor {name!r}: data_offsets {offsets} do not hold {dtype} of shape {shape}"
        )
    return TensorInfo(dtype, tuple(shape), offsets[0], offsets[1])


def _parsed_header(data: bytes, where: str, rules: HeaderRules) -> dict[str, Any]:
    """The JSON of a header, seen to hold no more than its tensors need before it is parsed."""
    marks = sum(data.count(mark) for mark in (b"[", b"{", b":", b","))
    if marks <= _MARKS_PER_TENSOR * rules.tensors:
        raw = parse_json(data, where)
        if len(raw) <= rules.tensors + 1:
            return raw
    raise HeaderError(
        f"{where} holds more values than {rules.tensors} tensors have, which is the most; give a "
        "file with fewer tensors"
    )


def _checked_header(
    file: BinaryIO, path: Path, rules: HeaderRules
) -> tuple[dict[str, TensorInfo], int]:
    """The entries of an open file, sorted by offset, and where its data section starts."""
    size_bytes = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    if len(prefix) < 8:
        raise TruncatedFileError(
            f"{path} has {len(prefix)} bytes, expected at least 8; fetch it again"
        )
    length = int.from_bytes(prefix, "little")
    if length > rules.size_bytes:
        raise HeaderError(
            f"{path}: header length {length} is over {rules.size_bytes} bytes; "
            "this is not a safetensors file of such tensors"
        )
    if 8 + length > size_bytes:
        raise TruncatedFileError(
            f"{path} has {size_bytes} bytes, its header alone needs {8 + length}; fetch it again"
        )
    raw = _parsed_header(file.read(length), f"{path} (header)", rules)
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(type(v) is not str for v in metadata.values()):
        raise HeaderError(f"{path}: __metadata__ is not a map from text to text")
    infos: dict[str, TensorInfo] = {}
    errors: list[SafegeneError] = []
    for name, value in raw.items():
        try:
            infos[name] = _entry(name, value, rules)
        except HeaderError as error:
            errors.append(HeaderError(f"{path}: {error}"))
    raise_errors(errors)
    infos = dict(sorted(infos.items(), key=lambda item: (item[1].begin, item[1].end)))
    expected_begin = 0
    for name, info in infos.items():
        if info.begin != expected_begin:
            problem = (
                "overlaps the tensor before it" if info.begin < expected_begin else "has a gap"
            )
            raise HeaderError(
                f"{path}: tensor {name!r} {problem}: starts at {info.begin}, "
                f"expected {expected_begin}"
            )
        expected_begin = info.end
    if 8 + length + expected_begin != size_bytes:
        raise TruncatedFileError(
            f"{path} has {size_bytes} bytes, its header promises {8 + length + expected_begin}; "
            "fetch it again"
        )
    return infos, 8 + length


def read_safetensors_header(path: Path, *, rules: HeaderRules = ADAPTER) -> dict[str, TensorInfo]:
    """Name, dtype, shape and place of every tensor in `path`, sorted by place. Torch-free.

    Errors: MissingFileError, TruncatedFileError, HeaderError, NonFiniteError.
    """
    path = Path(path)
    size_of_regular_file(path)
    with open(path, "rb") as file:
        return _checked_header(file, path, rules)[0]


def check_finite(path: Path) -> None:
    """Raise NonFiniteError naming each tensor of `path` with NaN or Inf. Torch-free.

    Errors also: those of `read_safetensors_header`.
    """
    import numpy

    path = Path(path)
    size_of_regular_file(path)
    errors: list[SafegeneError] = []
    with open(path, "rb") as file:
        infos, start = _checked_header(file, path, ADAPTER)
        for name, info in infos.items():
            unsigned, exponent = _EXPONENTS[info.dtype]
            file.seek(start + info.begin)
            left = info.end - info.begin
            while left:
                data = file.read(min(left, _CHUNK_BYTES))
                if len(data) < min(left, _CHUNK_BYTES):
                    raise TruncatedFileError(
                        f"{path} became shorter while it was read; fetch it again"
                    )
                left -= len(data)
                values = numpy.frombuffer(data, dtype=unsigned)
                if bool(((values & exponent) == exponent).any()):
                    errors.append(NonFiniteError(f"{path}: tensor {name!r} holds NaN or Inf"))
                    break
    raise_errors(errors)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of `path`, on the CPU, in memory of its own (never a map of the file).

    Errors: those of `read_safetensors_header`; NonFiniteError naming each tensor with NaN or Inf.
    """
    import torch

    path = Path(path)
    size_of_regular_file(path)
    tensors: dict[str, torch.Tensor] = {}
    with open(path, "rb") as file:
        infos, start = _checked_header(file, path, ADAPTER)
        file.seek(start)
        for name, info in infos.items():
            data = bytearray(info.end - info.begin)
            if file.readinto(data) != len(data):
                raise TruncatedFileError(f"{path} became shorter while it was read; fetch it again")
            dtype = getattr(torch, _TORCH_NAMES[info.dtype])
            flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            tensors[name] = flat.reshape(info.shape)
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    raise_errors([NonFiniteError(f"{path}: tensor {name!r} holds NaN or Inf") for name in bad])
    return tensors


def dtype_name(tensor: torch.Tensor) -> str:
    """The safetensors name of the tensor's dtype; HeaderError if it is not a supported float."""
    name = str(tensor.dtype).removeprefix("torch.")
    for short, long in _TORCH_NAMES.items():
        if long == name:
            return short
    raise HeaderError(f"dtype {name} found, expected one of {', '.join(_TORCH_NAMES.values())}")


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's values, row by row, little-endian, as they stand in a safetensors file."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data)


def serialize(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """A safetensors file as bytes; equal tensors give equal bytes, whatever their order.

    Wider dtypes come first, then names in order, as the safetensors library does, so that every
    tensor is aligned for readers that map the file.
    """
    order = sorted(tensors, key=lambda name: (-FLOAT_BITS[dtype_name(tensors[name])], name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs: list[memoryview] = []
    end = 0
    for name in order:
        tensor, blob = tensors[name], tensor_bytes(tensors[name])
        header[name] = {
            "dtype": dtype_name(tensor),
            "shape": list(tensor.shape),
            "data_offsets": [end, end + len(blob)],
        }
        end += len(blob)
        blobs.append(blob)
    text = canonical_json(header, "safetensors header")
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *blobs])
