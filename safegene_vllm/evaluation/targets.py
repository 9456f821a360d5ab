"""Who is asked: a model, a tenant or a dose of the vector. Torch-free.

Not for how they are run: that is the two backends' business (answering here, and in plugin).
"""

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
from safegene_vllm.formats.tenant_directory import check_fits, kind_of, refuse_exported

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


def profile_of(subject: Target, header: FamilyHeader | None) -> Profile | None:
    """What the subject's vector is scaled by; None: it has no vector.

    Errors: ConfigError if there are coefficients and no family; FamilyMismatchError if the profile
    is another one than the subject says; those of reading and checking a profile.
    """
    if subject.coefficients is not None:
        if header is None:
            raise ConfigError(f"{subject.key} has coefficients, but no family is given")
        return make_profile(header, subject.coefficients, {"method": "evaluation"})
    if subject.directory is None or not has_profile(subject.directory):
        return None
    if header is None:
        raise ConfigError(
            f"{subject.key}: {subject.directory} has a profile, but no family is given; name it by "
            "--family"
        )
    profile = load_profile(subject.directory)
    if subject.profile is not None and profile.digest != subject.profile:
        raise FamilyMismatchError(
            f"{subject.key}: the profile in {subject.directory} is {profile.digest}, expected "
            f"{subject.profile}; it was changed while the evaluation ran: start again"
        )
    check_profile(profile, header)
    return profile


def checkpoint_of(subject: Target) -> Path | None:
    """The subject's own checkpoint, None if it is an adapter or a dose on the model."""
    if subject.directory is not None and kind_of(subject.directory) == "checkpoint":
        return subject.directory
    return None


def adapter_of(subject: Target) -> Path | None:
    """The subject's LoRA directory, None if it has none."""
    if subject.directory is not None and kind_of(subject.directory) == "adapter":
        return subject.directory
    return None


def before_and_after(name: str, directory: Path, header: FamilyHeader) -> list[Target]:
    """A tenant with every coefficient 0, and as its profile has it.

    Errors: AdapterRejectedError for an exported directory or a family; ConfigError without a profile;
    FamilyMismatchError or BoundsError if it belongs to another family.
    """
    refuse_exported(directory)
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


def check_targets(subjects: Sequence[Target], header: FamilyHeader | None) -> None:
    """Raise unless every subject can be made, and no two have one name and state."""
    faults: list[SafegeneError] = []
    keys = [subject.key for subject in subjects]
    for key in sorted({key for key in keys if keys.count(key) > 1}):
        faults.append(ConfigError(f"{key} is named twice; names must differ"))
    for subject in subjects:
        try:
            profile_of(subject, header)
            if subject.directory is not None and header is not None:
                check_fits(subject.directory, header)
        except SafegeneError as error:
            faults.append(type(error)(f"{subject.key}: {error}"))
    raise_errors(faults)
