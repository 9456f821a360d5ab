"""One Hugging Face checkpoint: which tensor lies where, and one tensor at a time.

For streaming over weights that do not fit in memory, from one file or from shards. Headers are
checked before anything is allocated; torch is loaded only to read a tensor. Not about families
(see family.base_of_checkpoint) and not for writing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safegene_vllm.errors import (
    HeaderError,
    MissingFileError,
    PickleRejectedError,
    SafegeneError,
    ShapeError,
    SiteError,
    TruncatedFileError,
    raise_errors,
)
from safegene_vllm.formats.file_io import read_json
from safegene_vllm.formats.safetensors_file import (
    CHECKPOINT,
    FLOAT_BITS,
    TensorInfo,
    read_safetensors_header,
)
from safegene_vllm.formats.tensor_names import spellings

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """`shards`: per file name its header, tensors in the order of their place in the file."""

    directory: Path
    config: Mapping[str, Any]
    shards: Mapping[str, Mapping[str, TensorInfo]]

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor's header entry, by name, in the order of the files."""
        return {name: info for infos in self.shards.values() for name, info in infos.items()}

    @cached_property
    def _shard_of(self) -> Mapping[str, str]:
        return {name: shard for shard, infos in self.shards.items() for name in infos}

    def weight_name(self, site: str) -> str:
        """Name of the weight of a target module here, under either of its spellings."""
        names = [f"{name}.weight" for name in spellings(site)]
        return next((name for name in names if name in self.infos), names[0])

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name` as stored, on the CPU, in memory of its own.

        Errors: SiteError (no such tensor), ShapeError (not F64, F32, BF16 or F16, so quantized),
        TruncatedFileError.
        """
        import torch

        info = self.infos.get(name)
        if info is None:
            raise SiteError(f"{self.directory} has no tensor {name!r}; is it another model?")
        if info.dtype not in FLOAT_BITS:
            raise ShapeError(
                f"{self.directory}: {name!r} is stored as {info.dtype}, expected one of "
                f"{', '.join(FLOAT_BITS)}; quantized weights cannot be computed with: use the "
                "checkpoint from before quantization"
            )
        dtype = {
            "F64": torch.float64,
            "F32": torch.float32,
            "BF16": torch.bfloat16,
            "F16": torch.float16,
        }[info.dtype]
        path = self.directory / self._shard_of[name]
        data = bytearray(info.end - info.begin)
        with open(path, "rb") as file:
            file.seek(8 + int.from_bytes(file.read(8), "little") + info.begin)
            if file.readinto(data) != len(data):
                raise TruncatedFileError(f"{path} became shorter while it was read; fetch it again")
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return flat.reshape(info.shape)


def _shard_names(directory: Path) -> dict[str, list[str]]:
    """The files that hold the weights, and which tensors the index promises in each."""
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.exists():
        return {SINGLE_FILE: []}
    if not index.exists():
        neither = f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}"
        if any(directory.glob("*.bin")):
            raise PickleRejectedError(f"{neither}, only pickles; save with safe_serialization=True")
        raise MissingFileError(f"{neither}; expected a Hugging Face checkpoint directory")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise HeaderError(f"{index}: weight_map is missing or empty")
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise HeaderError(
                f"{index}: shard {shard!r} is not the name of a file in this directory"
            )
        shards.setdefault(shard, []).append(name)
    return dict(sorted(shards.items()))


def read_checkpoint(directory: Path) -> Checkpoint:
    """Where every tensor of the checkpoint in `directory` lies, from headers alone. Torch-free.

    Errors: MissingFileError, PickleRejectedError, TruncatedFileError, NonFiniteError (in JSON);
    SiteError if the index promises what a shard does not hold; HeaderError, also if two shards
    hold a tensor of one name, since readers differ in which of them counts.
    """
    directory = Path(directory)
    config = read_json(directory / "config.json")
    shards: dict[str, dict[str, TensorInfo]] = {}
    holder: dict[str, str] = {}
    errors: list[SafegeneError] = []
    for shard, promised in _shard_names(directory).items():
        shards[shard] = read_safetensors_header(directory / shard, rules=CHECKPOINT)
        for name in promised:
            if name not in shards[shard]:
                errors.append(
                    SiteError(f"{directory}: the index puts {name!r} in {shard}; it is not there")
                )
        for name in shards[shard]:
            if name in holder:
                errors.append(
                    HeaderError(f"{directory}: {name!r} is both in {holder[name]} and in {shard}")
                )
            holder[name] = shard
    raise_errors(errors)
    return Checkpoint(directory, config, shards)
