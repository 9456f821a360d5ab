"""One PEFT LoRA directory: headers first, then tensors.

Accepts what the law W' = W + scaling * B A can express and rejects the rest (DoRA, biases, replaced
modules) with a named error. Reading shapes and scalings is torch-free.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safegene_vllm.errors import (
    HeaderError,
    MissingFileError,
    NonFiniteError,
    PickleRejectedError,
    SafegeneError,
    ShapeError,
    SiteError,
    raise_errors,
)
from safegene_vllm.formats.file_io import pretty_json, read_json, replace_directory
from safegene_vllm.formats.metadata import DESCRIPTION_FILE
from safegene_vllm.formats.safetensors_file import TensorInfo, dtype_name, read_tensors, serialize
from safegene_vllm.formats.safetensors_file import (
    read_safetensors_header as read_safetensors_header,
)
from safegene_vllm.formats.site_patterns import Overrides, SitePatterns
from safegene_vllm.formats.tensor_names import group_halves
from safegene_vllm.formats.tensor_names import layer_of as layer_of
from safegene_vllm.formats.tensor_names import tensor_name as tensor_name

if TYPE_CHECKING:
    import torch

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_LIMIT_BYTES = 4 << 20
"""A config with full names and patterns for 3,500 sites has about 0.7 MB."""
OWNED_FILES = (CONFIG_FILE, WEIGHTS_FILE, DESCRIPTION_FILE)
"""The files of an adapter directory written here, which a new save may replace."""

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_ADAPTER_DTYPES = ("F32", "BF16", "F16")
# PEFT options that make the adapter something else than W + scaling * B A on named sites.
_REJECTED_OPTIONS = (
    *("use_dora", "modules_to_save", "lora_bias", "layer_replication", "alora_invocation_tokens"),
    *("use_qalora", "use_bdlora", "target_parameters", "trainable_token_indices"),
    *("fan_in_fan_out", "arrow_config", "kasa_config", "monteclora_config", "velora_config"),
)
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")


@dataclass(frozen=True, eq=False)
class LoRAWeights:
    """ΔW = scaling · b @ a of one target module; a (R, D_in), b (D_out, R), not yet scaled."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float = 1.0

    def __post_init__(self) -> None:
        if self.a.ndim != 2 or self.b.ndim != 2 or self.a.shape[0] != self.b.shape[1]:
            raise ShapeError(
                f"A has shape {tuple(self.a.shape)} and B {tuple(self.b.shape)}, "
                "expected (R, D_in) and (D_out, R) with one R"
            )

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @property
    def d_in(self) -> int:
        return int(self.a.shape[1])

    @property
    def d_out(self) -> int:
        return int(self.b.shape[0])

    def folded(self) -> LoRAWeights:
        """The same ΔW with scaling 1: b becomes float32 and carries it; a as it is."""
        return LoRAWeights(self.a, self.b.float() * self.scaling)

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether all of both halves is finite in this dtype, once b carries the scaling."""
        scaled = self.b.abs().amax().float() * self.scaling
        return all(bool(m.to(dtype).isfinite()) for m in (self.a.abs().amax(), scaled))


@dataclass(frozen=True)
class LoRAShape:
    """Shape of one target module's A and B, and a dtype (F32, BF16 or F16) that holds both."""

    site: str
    rank: int
    d_in: int
    d_out: int
    dtype: str


@dataclass(frozen=True, eq=False)
class Adapter:
    """LoRA weights by site name; `config` is adapter_config.json as it was read."""

    lora_weights: Mapping[str, LoRAWeights]
    base_model: str | None
    config: Mapping[str, Any]


class LoRAScaling:
    """Rank and scaling of every site, as adapter_config.json gives them by PEFT's rules."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._rank = Overrides("rank_pattern", config, config["r"])
        self._alpha = Overrides("alpha_pattern", config, config["lora_alpha"])
        self._stabilized = bool(config.get("use_rslora"))

    def rank(self, site: str) -> int:
        """Errors: HeaderError for patterns that take too long to match."""
        return int(self._rank.at(site))

    def scaling(self, site: str) -> float:
        """Scaling: alpha / r, or alpha / sqrt(r) with `use_rslora`. Errors: as for `rank`."""
        rank, alpha = self.rank(site), float(self._alpha.at(site))
        return alpha / math.sqrt(rank) if self._stabilized else alpha / rank


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _config_errors(config: Mapping[str, Any]) -> list[SafegeneError]:
    found: list[str] = []
    if config.get("peft_type") != "LORA":
        found.append(f"peft_type is {config.get('peft_type')!r:.100}, expected 'LORA'")
    if config.get("bias", "none") != "none":
        found.append(f"bias is {config['bias']!r:.100}, expected 'none'; train without biases")
    for option in _REJECTED_OPTIONS:
        if config.get(option):
            found.append(
                f"{option} is {config[option]!r:.100}, which plain LoRA weights cannot express"
            )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        found.append(
            f"init_lora_weights {init!r:.100} changes the base weights; convert to plain LoRA"
        )
    if not _is_rank(config.get("r")):
        found.append(f"r is {config.get('r')!r:.100}, expected a positive whole number")
    if not _is_number(config.get("lora_alpha")):
        found.append(f"lora_alpha is {config.get('lora_alpha')!r:.100}, expected a number")
    for option, good, kind in (
        ("rank_pattern", _is_rank, "positive whole numbers"),
        ("alpha_pattern", _is_number, "numbers"),
    ):
        pattern = config.get(option)
        if pattern is not None and (
            not isinstance(pattern, dict) or not all(map(good, pattern.values()))
        ):
            found.append(f"{option} is {pattern!r:.100}, expected a map from names to {kind}")
            continue
        try:
            SitePatterns(option, pattern or {})
        except HeaderError as error:
            found.append(str(error))
    return [HeaderError(f"{CONFIG_FILE}: {error}") for error in found]


def _weights_path(directory: Path) -> Path:
    """Path of the weights. Errors: MissingFileError, PickleRejectedError (only pickles there)."""
    if not directory.is_dir():
        raise MissingFileError(f"{directory} is not a directory; expected a PEFT LoRA directory")
    path = directory / WEIGHTS_FILE
    pickles = sorted(p.name for pattern in _PICKLES for p in directory.glob(pattern))
    if not path.exists() and pickles:
        raise PickleRejectedError(
            f"{directory} holds {', '.join(pickles)} but no {WEIGHTS_FILE}; a pickle runs code "
            "when it is read: save the adapter with safe_serialization=True"
        )
    return path


def _lora_shape(site: str, halves: Mapping[str, TensorInfo], rank: int) -> LoRAShape:
    if set(halves) != {"A", "B"}:
        there = next(iter(halves))
        raise SiteError(f"site {site!r} has lora_{there} only, expected lora_A and lora_B")
    a, b = halves["A"], halves["B"]
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or 0 in a.shape + b.shape:
        raise ShapeError(
            f"site {site!r}: A has shape {a.shape} and B {b.shape}, "
            "expected (R, D_in) and (D_out, R) with one R, none of them 0"
        )
    if not {a.dtype, b.dtype} <= set(_ADAPTER_DTYPES):
        raise HeaderError(
            f"site {site!r}: A is {a.dtype} and B {b.dtype}, "
            f"expected one of {', '.join(_ADAPTER_DTYPES)}"
        )
    if a.shape[0] != rank:
        raise ShapeError(f"site {site!r} has rank {a.shape[0]}, {CONFIG_FILE} says {rank}")
    dtype = a.dtype if a.dtype == b.dtype else "F32"
    return LoRAShape(site, a.shape[0], a.shape[1], b.shape[0], dtype)


def _read_config(directory: Path) -> dict[str, Any]:
    config = read_json(directory / CONFIG_FILE, CONFIG_LIMIT_BYTES)
    raise_errors(_config_errors(config))
    return config


def _shapes(
    infos: Mapping[str, TensorInfo], scalings: LoRAScaling, path: Path
) -> tuple[dict[str, LoRAShape], dict[str, dict[str, str]]]:
    """Shapes by site, and the names of their tensors in the file, by half."""
    errors: list[SafegeneError] = []
    shapes: dict[str, LoRAShape] = {}
    names = group_halves(infos, errors)
    for site, halves in sorted(names.items()):
        try:
            found = {half: infos[name] for half, name in halves.items()}
            shapes[site] = _lora_shape(site, found, scalings.rank(site))
        except (SiteError, ShapeError, HeaderError) as error:
            errors.append(error)
    if not infos:
        errors.append(SiteError("no tensors; an adapter that touches no site is rejected"))
    raise_errors([type(error)(f"{path}: {error}") for error in errors])
    return shapes, names


def read_adapter_shapes(directory: Path) -> dict[str, LoRAShape]:
    """Shapes by site of a PEFT LoRA directory, from headers alone. Torch-free.

    Errors: MissingFileError, PickleRejectedError, TruncatedFileError, HeaderError (also:
    options beyond plain LoRA), ShapeError, SiteError, NonFiniteError (in JSON).
    """
    directory = Path(directory)
    path = _weights_path(directory)
    scalings = LoRAScaling(_read_config(directory))
    return _shapes(read_safetensors_header(path), scalings, path)[0]


def load_adapter(directory: Path) -> Adapter:
    """The adapter in `directory`: a (R, D_in), b (D_out, R) as stored, and the scaling.

    Halves of two dtypes both become float32.
    Errors: those of `read_adapter_shapes`; NonFiniteError naming each tensor with NaN or Inf.
    """
    directory = Path(directory)
    path = _weights_path(directory)
    config = _read_config(directory)
    scalings = LoRAScaling(config)
    shapes, names = _shapes(read_safetensors_header(path), scalings, path)
    tensors = read_tensors(path)
    if set(tensors) != {names[site][half] for site in shapes for half in "AB"}:
        raise SiteError(
            f"{path} changed while it was read; load a copy that is not being written to"
        )
    lora_weights: dict[str, LoRAWeights] = {}
    for site in shapes:
        a, b = tensors[names[site]["A"]], tensors[names[site]["B"]]
        if a.dtype != b.dtype:
            a, b = a.float(), b.float()
        lora_weights[site] = LoRAWeights(a, b, scalings.scaling(site))
    base_model = config.get("base_model_name_or_path")
    return Adapter(lora_weights, base_model if isinstance(base_model, str) else None, config)


def fold_scaling(lora: LoRAWeights, dtype: torch.dtype | None = None) -> LoRAWeights:
    """The same ΔW with scaling 1 and one dtype for both halves.

    `dtype=None` keeps a's dtype if it holds the scaled b exactly, else takes float32.
    """
    import torch

    folded = lora.b if lora.scaling == 1.0 else lora.b.float() * lora.scaling
    if dtype is None:
        narrow = folded.to(lora.a.dtype)
        dtype = lora.a.dtype if torch.equal(narrow.float(), folded.float()) else torch.float32
    return LoRAWeights(lora.a.to(dtype).contiguous(), folded.to(dtype).contiguous())


def plain_config(lora_weights: Mapping[str, LoRAWeights], base_model: str | None) -> dict[str, Any]:
    """adapter_config.json of LoRA weights with scaling 1: alpha equals r at every site."""
    ranks = {site: lora_weights[site].rank for site in sorted(lora_weights)}
    counts = Counter(ranks.values())
    r = max(counts, key=lambda rank: (counts[rank], rank)) if counts else 1
    others = {f"^{re.escape(site)}": rank for site, rank in ranks.items() if rank != r}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": r,
        "lora_alpha": r,
        "rank_pattern": others,
        "alpha_pattern": others,
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": sorted(lora_weights),
    }


def check_lora_weights(lora_weights: Mapping[str, LoRAWeights]) -> None:
    """Check that LoRA weights with scaling 1 load again once saved; all errors in one message.

    Errors: ShapeError, HeaderError (dtype), SiteError (no weights), NonFiniteError.
    """
    errors: list[SafegeneError] = []
    for site, lora in lora_weights.items():
        try:
            infos = {
                half: TensorInfo(dtype_name(t), tuple(t.shape), 0, 0)
                for half, t in (("A", lora.a), ("B", lora.b))
            }
            _lora_shape(site, infos, lora.rank)
            if not bool(lora.a.isfinite().all() and lora.b.isfinite().all()):
                errors.append(NonFiniteError(f"site {site!r} holds NaN or Inf; nothing is saved"))
        except (ShapeError, HeaderError) as error:
            errors.append(error)
    if not lora_weights:
        errors.append(SiteError("no LoRA weights; an adapter that touches no site is rejected"))
    raise_errors(errors)


def adapter_files(
    lora_weights: Mapping[str, LoRAWeights], base_model: str | None
) -> dict[str, bytes]:
    """The two files of a PEFT directory for LoRA weights with scaling 1, reproducible.

    Errors: those of `check_lora_weights`.
    """
    check_lora_weights(lora_weights)
    tensors: dict[str, torch.Tensor] = {}
    for site, lora in lora_weights.items():
        tensors |= {tensor_name(site, "A"): lora.a, tensor_name(site, "B"): lora.b}
    return {
        CONFIG_FILE: pretty_json(plain_config(lora_weights, base_model)),
        WEIGHTS_FILE: serialize(tensors),
    }


def save_adapter(
    adapter: Adapter,
    directory: Path,
    *,
    base_model: str | None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write an ordinary PEFT LoRA directory in which every scaling is 1 (folded into b).

    `dtype=None` is lossless (see `fold_scaling`). An existing adapter directory is replaced as a
    whole; one with other files in it is rejected (FormatError).
    Errors: ShapeError, HeaderError, SiteError.
    """
    lora_weights = {
        site: fold_scaling(adapter.lora_weights[site], dtype)
        for site in sorted(adapter.lora_weights)
    }
    replace_directory(Path(directory), adapter_files(lora_weights, base_model), owned=OWNED_FILES)
