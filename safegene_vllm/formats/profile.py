"""A profile on disk: the coefficients of one tenant for one family. Torch-free.

A profile is a safegene.json in a tenant's directory and holds no tensors. The file format is
specified in docs/reference/format.md.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safegene_vllm.errors import (
    BoundsError,
    DigestError,
    FamilyMismatchError,
    FormatError,
    HeaderError,
    SafegeneError,
    raise_errors,
)
from safegene_vllm.formats.file_io import (
    digest_of,
    plain_json,
    pretty_json,
    read_json,
    replace_file,
)
from safegene_vllm.formats.metadata import (
    DESCRIPTION_FILE,
    FORMAT_VERSION,
    check_description,
    is_digest,
    is_number,
)

if TYPE_CHECKING:
    from safegene_vllm.formats.family import FamilyHeader

_FIELDS: Mapping[str, type] = {"family": str, "coefficients": list, "calibration": dict}


@dataclass(frozen=True)
class Profile:
    """One coefficient per layer of the base (0.0 where no vector is), for one family's digest."""

    family: str
    coefficients: tuple[float, ...]
    calibration: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """`sha256:<hex>` of the canonical JSON of the file without its digest."""
        return digest_of(_description(self), "profile")


def _description(profile: Profile) -> dict[str, Any]:
    return {
        "kind": "profile",
        "format_version": FORMAT_VERSION,
        "family": profile.family,
        "coefficients": list(profile.coefficients),
        "calibration": dict(profile.calibration),
    }


def make_profile(
    header: FamilyHeader,
    coefficients: Sequence[float] | Mapping[int, float] | float,
    calibration: Mapping[str, Any] | None = None,
) -> Profile:
    """A checked profile for the family of `header`.

    `coefficients`: one number per layer of the base; or a map from layer to number, other layers 0;
    or one number for every layer that carries a vector.
    Errors: BoundsError; HeaderError or NonFiniteError if `calibration` is not plain JSON.
    """
    if isinstance(coefficients, Mapping):
        outside = sorted(set(coefficients) - set(range(header.num_layers)))
        if outside:
            raise BoundsError(f"layers {outside} are outside 0..{header.num_layers - 1}")
        values = [coefficients.get(layer, 0.0) for layer in range(header.num_layers)]
    elif isinstance(coefficients, Sequence):
        values = list(coefficients)
    else:
        selected = {entry.layer for entry in header.layers}
        values = [coefficients if n in selected else 0.0 for n in range(header.num_layers)]
    # Adding 0.0 turns -0.0 into 0.0, so that equal profiles have equal digests.
    profile = Profile(
        header.digest,
        tuple(float(value) + 0.0 for value in values),
        plain_json(calibration or {}, "calibration"),
    )
    check_profile(profile, header)
    return profile


def check_profile(profile: Profile, header: FamilyHeader) -> None:
    """Check that `profile` fits the family of `header`; all errors in one message.

    Errors: FamilyMismatchError (names both), BoundsError (count, NaN or Inf, out of bounds,
    non-zero on a layer without a vector).
    """
    if profile.family != header.digest:
        raise FamilyMismatchError(
            f"the profile is for family {profile.family}, this is {header.name!r} {header.digest}; "
            "calibrate the tenant against this family"
        )
    found: list[str] = []
    if len(profile.coefficients) != header.num_layers:
        found.append(
            f"{len(profile.coefficients)} coefficients, expected {header.num_layers}, one per layer"
        )
    low, high = header.bounds
    selected = {entry.layer for entry in header.layers}
    for layer, value in enumerate(profile.coefficients[: header.num_layers]):
        if not math.isfinite(value):
            found.append(f"layer {layer} has coefficient {value}, expected a finite number")
        elif layer not in selected and value != 0.0:
            found.append(f"layer {layer} has coefficient {value} but no vector, expected 0")
        elif layer in selected and not low <= value <= high:
            found.append(f"layer {layer} has coefficient {value}, expected {low} to {high}")
    errors: list[SafegeneError] = [BoundsError(error) for error in found]
    raise_errors(errors)


def profile_json(profile: Profile) -> dict[str, Any]:
    """The whole description of `profile`, its digest with it, as plain JSON values.

    Errors: HeaderError or NonFiniteError if the profile cannot be written as JSON.
    """
    return plain_json({**_description(profile), "digest": profile.digest}, "profile")


def parse_profile(raw: Mapping[str, Any], where: str) -> Profile:
    """The profile that `raw` describes; errors name `where`.

    Errors: FormatError, the subclass says which rule; DigestError if it was altered.
    """
    fields = check_description(raw, "profile", _FIELDS, where)
    errors: list[SafegeneError] = []
    if not is_digest(fields["family"]):
        errors.append(
            HeaderError(f"{where}: family {fields['family']!r} is not sha256:<64 hex digits>")
        )
    for layer, value in enumerate(fields["coefficients"]):
        if not is_number(value):
            errors.append(
                HeaderError(f"{where}: coefficient {layer} is {value!r}, expected a number")
            )
        elif isinstance(value, int) and abs(value) > sys.float_info.max:
            errors.append(
                HeaderError(f"{where}: coefficient {layer} is larger than any float can be")
            )
    raise_errors(errors)
    coefficients = tuple(float(value) for value in fields["coefficients"])
    profile = Profile(fields["family"], coefficients, fields["calibration"])
    if profile.digest != fields["digest"]:
        raise DigestError(
            f"{where}: the content has digest {profile.digest}, the file says {fields['digest']}; "
            "it was altered after calibration: calibrate again"
        )
    return profile


def load_profile(path: Path) -> Profile:
    """The profile in the directory `path`, or in the file `path`.

    Errors: MissingFileError, NonFiniteError; those of `parse_profile`.
    """
    path = Path(path)
    if path.is_dir():
        path = path / DESCRIPTION_FILE
    return parse_profile(read_json(path), str(path))


def has_profile(directory: Path) -> bool:
    """Whether a safegene.json exists, readable or not: a broken one is an error, never "none"."""
    try:
        (Path(directory) / DESCRIPTION_FILE).lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def save_profile(profile: Profile, directory: Path) -> None:
    """Write `directory`/safegene.json as a whole or not at all; other files remain.

    Errors: FormatError if the directory is a family, whose description would be lost;
    NonFiniteError or HeaderError if the profile cannot be written as JSON.
    """
    path = Path(directory) / DESCRIPTION_FILE
    try:
        is_family = has_profile(directory) and read_json(path).get("kind") == "family"
    except FormatError:
        is_family = False
    if is_family:
        raise FormatError(f"{directory} is a family; save the profile in the tenant's directory")
    replace_file(path, pretty_json({**_description(profile), "digest": profile.digest}))
