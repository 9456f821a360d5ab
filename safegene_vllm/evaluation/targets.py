"""Targets of an evaluation: a model, a tenant, or coefficients of the vector. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safegene_vllm.errors import ConfigError, FamilyMismatchError, SafegeneError, raise_errors
from safegene_vllm.formats.family import FamilyHeader
from safegene_vllm.formats.profile import (
    Profile,
    check_profile,
    has_profile,
    load_profile,
    make_profile,
)
from safegene_vllm.formats.tenant_directory import check_fits, kind_of, reject_exported

PARENT, BEFORE, AFTER = "parent", "before", "after"


@dataclass(frozen=True)
class Target:
    """One model in one state.

    `directory`: the tenant's (adapter, checkpoint or bare profile); None: the model itself.
    `coefficients`: one per layer, in place of those in the directory's profile; None: as they are
    there, or no vector where there is no profile. `profile`: the digest that the directory's
    profile must have, None: any.
    """

    name: str
    state: str
    directory: Path | None = None
    coefficients: tuple[float, ...] | None = None
    profile: str | None = None

    @property
    def key(self) -> str:
        """NAME/STATE, unique in an evaluation."""
        return f"{self.name}/{self.state}"


def profile_of(target: Target, header: FamilyHeader | None) -> Profile | None:
    """The target's profile; None: it has no vector.

    Errors: ConfigError if there are coefficients and no family; FamilyMismatchError if the profile
    does not have the target's digest; those of reading and checking a profile.
    """
    if target.coefficients is not None:
        if header is None:
            raise ConfigError(f"{target.key} has coefficients, but no family is given")
        return make_profile(header, target.coefficients, {"method": "evaluation"})
    if target.directory is None or not has_profile(target.directory):
        return None
    if header is None:
        raise ConfigError(
            f"{target.key}: {target.directory} has a profile, but no family is given; name it by "
            "--family"
        )
    profile = load_profile(target.directory)
    if target.profile is not None and profile.digest != target.profile:
        raise FamilyMismatchError(
            f"{target.key}: the profile in {target.directory} is {profile.digest}, expected "
            f"{target.profile}; it was changed while the evaluation ran: start again"
        )
    check_profile(profile, header)
    return profile


def checkpoint_of(target: Target) -> Path | None:
    """The target's own checkpoint, None if it is an adapter or coefficients on the model."""
    if target.directory is not None and kind_of(target.directory) == "checkpoint":
        return target.directory
    return None


def adapter_of(target: Target) -> Path | None:
    """The target's LoRA directory, None if it has none."""
    if target.directory is not None and kind_of(target.directory) == "adapter":
        return target.directory
    return None


def before_and_after(name: str, directory: Path, header: FamilyHeader) -> list[Target]:
    """A tenant with all coefficients 0, and with those of its profile.

    Errors: AdapterRejectedError for an exported directory or a family; ConfigError without
    a profile; FamilyMismatchError or BoundsError if it belongs to another family.
    """
    reject_exported(directory)
    check_fits(directory, header)
    if not has_profile(directory):
        raise ConfigError(
            f"tenant {name!r}: {directory} has no profile, so there is no state after; make one by "
            "`safegene calibrate` or `safegene profile`"
        )
    profile = load_profile(directory)
    check_profile(profile, header)
    zeros = (0.0,) * header.num_layers
    return [
        Target(name, BEFORE, directory, zeros),
        Target(name, AFTER, directory, None, profile.digest),
    ]


def check_targets(targets: Sequence[Target], header: FamilyHeader | None) -> None:
    """Check that every target can be made and has a name and state of its own."""
    errors: list[SafegeneError] = []
    keys = [target.key for target in targets]
    for key in sorted({key for key in keys if keys.count(key) > 1}):
        errors.append(ConfigError(f"{key} is named twice; names must differ"))
    for target in targets:
        try:
            profile_of(target, header)
            if target.directory is not None and header is not None:
                check_fits(target.directory, header)
        except SafegeneError as error:
            errors.append(type(error)(f"{target.key}: {error}"))
    raise_errors(errors)
