"""A family on disk: a PEFT LoRA directory plus safegene.json, and the base model it belongs to.

`base_of_checkpoint` and `read_family_header` are torch-free. The file format is
specified in docs/reference/format.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safegene_vllm.errors import (
    DigestError,
    FormatError,
    HeaderError,
    SafegeneError,
    SiteError,
    raise_errors,
)
from safegene_vllm.formats.adapter import (
    OWNED_FILES,
    LoRAScaling,
    LoRAShape,
    LoRAWeights,
    adapter_files,
    check_lora_weights,
    fold_scaling,
    layer_of,
    load_adapter,
    read_adapter_shapes,
    tensor_name,
)
from safegene_vllm.formats.checkpoint import read_checkpoint
from safegene_vllm.formats.file_io import (
    digest_of,
    plain_json,
    pretty_json,
    read_json,
    replace_directory,
)
from safegene_vllm.formats.metadata import (
    DESCRIPTION_FILE,
    FORMAT_VERSION,
    field_errors,
    is_digest,
    is_number,
    read_description,
)
from safegene_vllm.formats.safetensors_file import (
    dtype_name,
    tensor_bytes,
)

if TYPE_CHECKING:
    import torch

_FIELDS: Mapping[str, type] = {
    "name": str,
    "base": dict,
    "layers": list,
    "coefficient_bounds": list,
    "recipe": dict,
}
_BASE_FIELDS: Mapping[str, type] = {"architecture": str, "num_layers": int, "fingerprint": str}
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


@dataclass(frozen=True)
class Base:
    """What all members of a family share; `fingerprint` is `sha256:<hex>`."""

    architecture: str
    num_layers: int
    fingerprint: str


@dataclass(frozen=True)
class SelectedLayer:
    """A layer that carries a vector, and the score that got it selected (None: not scored)."""

    layer: int
    score: float | None = None


@dataclass(frozen=True)
class FamilyHeader:
    """A family without its tensors; `path` (None: not on disk) does not count in comparisons."""

    base: Base
    sites: Mapping[str, LoRAShape]
    layers: tuple[SelectedLayer, ...]
    bounds: tuple[float, float]
    recipe: Mapping[str, Any]
    name: str
    digest: str
    path: Path | None = field(default=None, compare=False)

    @property
    def num_layers(self) -> int:
        return self.base.num_layers

    @property
    def max_rank(self) -> int:
        return max(site.rank for site in self.sites.values())


@dataclass(frozen=True, eq=False)
class Family:
    """A family with its tensors: per site a (R, D_in) and b (D_out, R) as stored, scaling 1."""

    header: FamilyHeader
    lora_weights: Mapping[str, LoRAWeights]

    @property
    def digest(self) -> str:
        return self.header.digest


def base_of_checkpoint(directory: Path) -> Base:
    """Architecture, layer count and fingerprint of a Hugging Face checkpoint. Torch-free.

    The fingerprint covers the architecture and the shape (D_out, D_in) of every 2-D weight inside a
    layer; not path, dtype, values, nor the vocabulary (a tenant may add tokens).
    Errors: MissingFileError, PickleRejectedError, HeaderError, TruncatedFileError, SiteError.
    """
    directory = Path(directory)
    config_path = directory / "config.json"
    config = read_json(config_path)
    text = config.get("text_config")
    both = {**(text if isinstance(text, dict) else {}), **config}
    architectures = config.get("architectures")
    num_layers = next((both[key] for key in _LAYER_COUNTS if key in both), None)
    errors: list[SafegeneError] = []
    if (
        not isinstance(architectures, list)
        or not architectures
        or type(architectures[0]) is not str
    ):
        errors.append(
            HeaderError(f"{config_path}: architectures is {architectures!r}, expected a name")
        )
    if type(num_layers) is not int or num_layers < 1:
        errors.append(HeaderError(f"{config_path}: num_hidden_layers is {num_layers!r}"))
    raise_errors(errors)
    sites = {
        name.removesuffix(".weight"): list(info.shape)
        for name, info in read_checkpoint(directory).infos.items()
        if name.endswith(".weight") and len(info.shape) == 2 and layer_of(name) is not None
    }
    if not sites:
        quantization = both.get("quantization_config")
        if isinstance(quantization, dict):
            method = quantization.get("quant_method", "unknown method")
            raise SiteError(
                f"{directory} is quantized ({method!r:.40}): its files hold no plain 2-D weight "
                "inside a layer to take the base's shapes from. Name the original, unquantized "
                "checkpoint"
            )
        raise SiteError(f"{directory}: no 2-D weight inside a layer; this model cannot be a base")
    architecture = str(architectures[0])  # type: ignore[index]
    shape = {"architecture": architecture, "sites": sites}
    return Base(architecture, int(num_layers), digest_of(shape, str(directory)))  # type: ignore[arg-type]


def _layer_errors(header: FamilyHeader) -> list[SafegeneError]:
    """Disagreements between the selected layers and the sites."""
    errors: list[SafegeneError] = []
    selected = [entry.layer for entry in header.layers]
    if selected != sorted(set(selected)):
        errors.append(HeaderError(f"layers {selected} are not in ascending order, each once"))
    for layer in selected:
        if not 0 <= layer < header.num_layers:
            errors.append(HeaderError(f"layer {layer} is outside 0..{header.num_layers - 1}"))
    carried: set[int] = set()
    for site in header.sites:
        layer_number = layer_of(site)
        if layer_number is None:
            errors.append(SiteError(f"site {site!r} is in no layer, so no coefficient reaches it"))
        else:
            carried.add(layer_number)
    for layer in sorted(carried ^ set(selected)):
        what = "has weights but is not" if layer in carried else "has no weights but is"
        errors.append(SiteError(f"layer {layer} {what} in the selected layers {selected}"))
    low, high = header.bounds
    if low > high:
        errors.append(HeaderError(f"coefficient_bounds {[low, high]} are not in order"))
    return errors


def _parsed(raw: Mapping[str, Any], sites: Mapping[str, LoRAShape], path: Path) -> FamilyHeader:
    """The header in checked JSON fields; all further errors together."""
    errors = field_errors("base", raw["base"], _BASE_FIELDS)
    base = raw["base"]
    if not errors and base["num_layers"] < 1:
        errors.append(f"base: num_layers is {base['num_layers']}, expected at least 1")
    if not errors and not is_digest(base["fingerprint"]):
        errors.append(f"base: fingerprint {base['fingerprint']!r} is not sha256:<64 hex digits>")
    if not raw["name"]:
        errors.append("name is empty")
    bounds = raw["coefficient_bounds"]
    if len(bounds) != 2 or not all(map(is_number, bounds)):
        errors.append(f"coefficient_bounds is {bounds!r}, expected two numbers")
    for entry in raw["layers"]:
        if (
            not isinstance(entry, dict)
            or set(entry) != {"layer", "score"}
            or type(entry["layer"]) is not int
            or not (entry["score"] is None or is_number(entry["score"]))
        ):
            errors.append(
                f"layers: {entry!r} is not {{layer: whole number, score: number or null}}"
            )
    raise_errors([HeaderError(f"{path}: {error}") for error in errors])
    header = FamilyHeader(
        base=Base(base["architecture"], base["num_layers"], base["fingerprint"]),
        sites=sites,
        layers=tuple(
            SelectedLayer(e["layer"], None if e["score"] is None else float(e["score"]))
            for e in raw["layers"]
        ),
        bounds=(float(bounds[0]), float(bounds[1])),
        recipe=raw["recipe"],
        name=raw["name"],
        digest=raw["digest"],
        path=path.parent,
    )
    raise_errors([type(error)(f"{path}: {error}") for error in _layer_errors(header)])
    return header


def read_family_header(directory: Path) -> FamilyHeader:
    """A family without its tensors: all rules checked but values and digest. Torch-free.

    Errors: FormatError, the subclass says which rule.
    """
    directory = Path(directory)
    path = directory / DESCRIPTION_FILE
    raw = read_description(path, "family", _FIELDS)
    sites = read_adapter_shapes(directory)
    scalings = LoRAScaling(read_json(directory / "adapter_config.json"))
    scaled = [site for site in sites if scalings.scaling(site) != 1.0]
    if scaled:
        raise HeaderError(
            f"{directory}: scaling is not 1 at {', '.join(scaled[:3])}; in a family alpha equals r"
        )
    return _parsed(raw, sites, path)


def _description(header: FamilyHeader) -> dict[str, Any]:
    """safegene.json without its digest, in the order in which people read it."""
    base = header.base
    return {
        "kind": "family",
        "format_version": FORMAT_VERSION,
        "name": header.name,
        "base": {
            "architecture": base.architecture,
            "num_layers": base.num_layers,
            "fingerprint": base.fingerprint,
        },
        "layers": [{"layer": entry.layer, "score": entry.score} for entry in header.layers],
        "coefficient_bounds": list(header.bounds),
        "recipe": dict(header.recipe),
    }


def _digest(header: FamilyHeader, lora_weights: Mapping[str, LoRAWeights]) -> str:
    """The digest rule of docs/reference/format.md; header.digest itself does not count."""
    tensors = {
        tensor_name(site, half): {
            "dtype": dtype_name(tensor),
            "shape": list(tensor.shape),
            "sha256": hashlib.sha256(tensor_bytes(tensor)).hexdigest(),
        }
        for site, lora in lora_weights.items()
        for half, tensor in (("A", lora.a), ("B", lora.b))
    }
    return digest_of({**_description(header), "tensors": tensors}, f"family {header.name!r}")


def load_family(directory: Path, *, verify_digest: bool = True) -> Family:
    """The family in `directory`, tensors on the CPU as stored.

    Errors: FormatError, the subclass says which rule; DigestError if the content is not what the
    digest says (not looked at with `verify_digest=False`).
    """
    header = read_family_header(directory)
    lora_weights = load_adapter(directory).lora_weights
    if set(lora_weights) != set(header.sites):
        raise FormatError(
            f"{directory} changed while it was read; load a copy that is not being written to"
        )
    if verify_digest and (found := _digest(header, lora_weights)) != header.digest:
        raise DigestError(
            f"{directory}: the content has digest {found}, {DESCRIPTION_FILE} says "
            f"{header.digest}; fetch the family again"
        )
    return Family(header, lora_weights)


def make_family(
    name: str,
    base: Base,
    lora_weights: Mapping[str, LoRAWeights],
    *,
    layers: Sequence[SelectedLayer] | None = None,
    bounds: tuple[float, float] = (0.0, 3.0),
    recipe: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> Family:
    """A family from LoRA weights by site; scaling is folded into b, the digest computed.

    `layers` (default: every layer with weights) selects; weights of other layers are left out.
    `dtype=None` keeps each module's dtype if it holds the scaled b exactly, else float32.
    Errors: HeaderError, SiteError, ShapeError, NonFiniteError.
    """
    if layers is None:
        numbers = {layer_of(site) for site in lora_weights}
        layers = [SelectedLayer(number) for number in sorted(n for n in numbers if n is not None)]
        chosen_weights = dict(lora_weights)
    else:
        chosen = {entry.layer for entry in layers}
        chosen_weights = {
            site: lora for site, lora in lora_weights.items() if layer_of(site) in chosen
        }
    stored = {site: fold_scaling(chosen_weights[site], dtype) for site in sorted(chosen_weights)}
    sites = {
        site: LoRAShape(site, lora.rank, lora.d_in, lora.d_out, dtype_name(lora.a))
        for site, lora in stored.items()
    }
    unsigned = FamilyHeader(
        base=base,
        sites=sites,
        layers=tuple(
            SelectedLayer(e.layer, None if e.score is None else float(e.score)) for e in layers
        ),
        bounds=(float(bounds[0]), float(bounds[1])),
        recipe=plain_json(recipe, "recipe"),
        name=name,
        digest="",
    )
    raise_errors([type(f)(f"family {name!r}: {f}") for f in _layer_errors(unsigned)])
    check_lora_weights(stored)
    return Family(replace(unsigned, digest=_digest(unsigned, stored)), stored)


def save_family(family: Family, directory: Path) -> None:
    """Write a directory that PEFT loads as it is, at coefficient 1; equal families, equal bytes.

    An existing family directory is replaced as a whole, never mixed. Errors: DigestError if the
    family was altered after its digest was computed; FormatError if other files would be lost.
    """
    found = _digest(family.header, family.lora_weights)
    if found != family.digest:
        raise DigestError(
            f"the family has digest {found}, its header says {family.digest}; make it again"
        )
    files = adapter_files(family.lora_weights, None)
    files[DESCRIPTION_FILE] = pretty_json({**_description(family.header), "digest": family.digest})
    replace_directory(Path(directory), files, owned=OWNED_FILES)
