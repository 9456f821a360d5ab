"""Checks of fetched files against a family, as far as they need no torch.

Headers, shapes, dtypes, layers, NaN, the profile. The workers check again what they load; the
model's behavior is checked by the smoke test.
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
    """The profile that came with the adapter (None without one), after all checks passed.

    Messages name `shown`, the source as given, not the local copy. All errors in one message.
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
    errors: list[SafegeneError] = []
    for step in steps:
        try:
            step()
        except SafegeneError as error:
            renamed = type(error)(str(error).replace(str(directory), shown))
            if str(renamed) not in map(str, errors):
                errors.append(renamed)
    raise_errors(errors)
    return found[0] if found else None


def _check_layers(directory: Path, family: FamilyHeader) -> None:
    """Reject an adapter of a deeper base: vLLM would silently drop the layers this base lacks."""
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
