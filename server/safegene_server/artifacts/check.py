"""Whether fetched files are a tenant of a family: every check that needs no torch.

Headers, shapes, dtypes, layers, NaN, the profile. The workers check once more what they load; what
a model would answer is the gate's business.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safegene_vllm.errors import FamilyMismatchError, SafegeneError, raise_errors
from safegene_vllm.formats.adapter import WEIGHTS_FILE, layer_of, read_adapter_shapes
from safegene_vllm.formats.family import FamilyHeader
from safegene_vllm.formats.profile import Profile, check_profile, has_profile, load_profile
from safegene_vllm.formats.safetensors_file import check_finite
from safegene_vllm.formats.tenant_directory import check_fits


def check_tenant_files(directory: Path, family: FamilyHeader, shown: str) -> Profile | None:
    """The profile that lies beside the adapter (None: none does), once everything there is right.

    Messages speak of `shown`, the owner's words, not of our copy. All faults in one message.
    Errors: FormatError, FamilyMismatchError, BoundsError, AdapterRejectedError.
    """
    found: list[Profile] = []

    def profile() -> None:
        found.append(load_profile(directory))
        check_profile(found[0], family)

    steps: list[Callable[[], None]] = [lambda: check_fits(directory, family)]
    if (directory / WEIGHTS_FILE).exists():
        steps += [
            lambda: _check_layers(directory, family),
            lambda: check_finite(directory / WEIGHTS_FILE),
        ]
    if has_profile(directory):
        steps.append(profile)
    faults: list[SafegeneError] = []
    for step in steps:
        try:
            step()
        except SafegeneError as error:
            fault = type(error)(str(error).replace(str(directory), shown))
            if str(fault) not in map(str, faults):
                faults.append(fault)
    raise_errors(faults)
    return found[0] if found else None


def _check_layers(directory: Path, family: FamilyHeader) -> None:
    """An adapter of a deeper base has layers that this one lacks; vLLM would drop them silently."""
    count = family.num_layers
    outside = sorted(
        {n for site in read_adapter_shapes(directory) if (n := layer_of(site) or 0) >= count}
    )
    if outside:
        more = f" and {len(outside) - 5} more" if len(outside) > 5 else ""
        raise FamilyMismatchError(
            f"{directory} adapts layers {outside[:5]}{more}, the base of family {family.name!r} "
            f"has layers 0..{count - 1}; give an adapter of this base."
        )
