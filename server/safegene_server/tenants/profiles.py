"""Profiles from a requested change: a whole profile, coefficients, some layers, or a factor.

Arithmetic on coefficients, with a record of their origin. The family's bounds, its floor and the
smoke test decide elsewhere whether a profile may be served.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from safegene_server.registry import Revision
from safegene_vllm.errors import BoundsError, HeaderError
from safegene_vllm.formats.family import FamilyHeader
from safegene_vllm.formats.profile import Profile, check_profile, make_profile, parse_profile

RECORD_DEPTH = 64
RECORD_BYTES = 1 << 20


@dataclass(frozen=True)
class Change:
    """Change of a profile, given in exactly one form.

    A whole `profile` (its file's JSON); `coefficients`, one per layer, or one number for all layers
    that carry a vector; `layers`, layer -> coefficient, the others unchanged; `scale`, a factor on
    all of them.
    """

    profile: Mapping[str, Any] | None = None
    coefficients: Sequence[float] | float | None = None
    layers: Mapping[int, float] | None = None
    scale: float | None = None

    @property
    def form(self) -> str | None:
        """Name of the form that is given, None for none. Errors: BoundsError for several."""
        given = [f.name for f in fields(self) if getattr(self, f.name) is not None]
        if len(given) > 1:
            raise BoundsError(f"{' and '.join(given)} are given; expected one of them")
        return given[0] if given else None


def first_profile(header: FamilyHeader, change: Change) -> Profile | None:
    """A tenant's first profile, None if nothing is given; layers that are not named have 0.

    Errors: FormatError, FamilyMismatchError, BoundsError.
    """
    form = change.form
    if change.profile is not None:
        return _whole(header, change.profile)
    if form == "scale":
        raise BoundsError("scale is for a tenant that is served; give coefficients or a profile")
    given = change.coefficients if change.layers is None else change.layers
    return None if given is None else make_profile(header, given, {"method": "given", "as": form})


def changed_profile(header: FamilyHeader, current: Revision, change: Change) -> Profile:
    """The profile of `current` with `change` applied; that profile itself if nothing changes.

    Errors: FormatError, FamilyMismatchError, BoundsError.
    """
    old, form = current.profile, change.form
    requested: Any
    values: Sequence[float] | Mapping[int, float] | float
    if change.profile is not None:
        new = _whole(header, change.profile)
        return old if new.digest == old.digest else new
    if change.coefficients is not None:
        requested = values = change.coefficients
    elif change.layers is not None:
        requested = {str(layer): value for layer, value in change.layers.items()}
        values = {**dict(enumerate(old.coefficients)), **change.layers}
    elif change.scale is not None:
        requested, values = change.scale, [value * change.scale for value in old.coefficients]
    else:
        raise BoundsError("no change is given; expected coefficients, layers, scale or profile")
    # The numbers are checked before they are written down: NaN has no place in a record.
    bare = make_profile(header, values)
    if bare.coefficients == old.coefficients:
        return old
    made_from = {"revision": current.served_name, "profile": old.digest, str(form): requested}
    return make_profile(header, bare.coefficients, {"method": "change", "made_from": made_from})


def check_record(profile: Profile) -> None:
    """Check the depth and size of a record, which every server reads. Errors: HeaderError."""
    level: list[Any] = [dict(profile.calibration)]
    for _ in range(RECORD_DEPTH):
        level = [
            child
            for value in level
            if isinstance(value, dict | list)
            for child in (value.values() if isinstance(value, dict) else value)
        ]
    if level:
        raise HeaderError(
            f"profile: calibration is nested deeper than {RECORD_DEPTH} levels; shorten it"
        )
    size_bytes = len(json.dumps(dict(profile.calibration)))
    if size_bytes > RECORD_BYTES:
        raise HeaderError(
            f"profile: calibration is {size_bytes} bytes of JSON, expected at most {RECORD_BYTES}; "
            "shorten it"
        )


def _whole(header: FamilyHeader, raw: Mapping[str, Any]) -> Profile:
    profile = parse_profile(raw, "profile")
    check_profile(profile, header)
    check_record(profile)
    return profile
