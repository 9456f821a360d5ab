"""Check of every file a server needs, before vLLM starts; all errors are reported together.

Only headers are read: the workers check values (NaN, digests of tensors) when they load them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safegene_vllm.errors import (
    AdapterRejectedError,
    FamilyMismatchError,
    SafegeneError,
)
from safegene_vllm.formats.adapter import LoRAShape, layer_of, read_adapter_shapes
from safegene_vllm.formats.family import FamilyHeader, base_of_checkpoint, read_family_header
from safegene_vllm.formats.profile import check_profile, has_profile, load_profile
from safegene_vllm.formats.tenant_directory import reject_exported, site_errors
from safegene_vllm.formats.tenant_kind import slot_kind
from safegene_vllm.model_source import local_model
from safegene_vllm.plugin.staging import allowed, check_readable
from safegene_vllm.settings import Settings


@dataclass(frozen=True)
class Artifacts:
    """Headers of what will be served: the family, and each tenant's LoRA shapes by site."""

    header: FamilyHeader | None
    tenants: Mapping[str, Mapping[str, LoRAShape]]

    def modules(self) -> list[str]:
        """Target modules of family and tenants for --lora-target-modules, e.g. q_proj."""
        sites = set(self.header.sites if self.header else ())
        sites.update(site for shapes in self.tenants.values() for site in shapes)
        return sorted({site.rpartition(".")[2] for site in sites})

    def rank(self, *, composed: bool, others: int) -> int:
        """Rank needed in a LoRA slot; `others` is assumed if no tenant has an adapter."""
        safety = self.header.sites if self.header and composed else {}
        adapters = [shapes for shapes in self.tenants.values() if shapes]
        if not adapters:
            return others + max((shape.rank for shape in safety.values()), default=0)
        return max(
            (shapes[site].rank if site in shapes else 0)
            + (safety[site].rank if site in safety else 0)
            for shapes in adapters
            for site in {*shapes, *safety}
        )


def read_artifacts(
    model: str, settings: Settings, tenants: Mapping[str, Path]
) -> tuple[Artifacts, list[SafegeneError]]:
    """Read the headers of everything the settings and tenants name, and collect the errors.

    Invalid files are left out of the artifacts. Errors in the list: FormatError,
    FamilyMismatchError, BoundsError, AdapterRejectedError.
    """
    faults: list[SafegeneError] = []
    header: FamilyHeader | None = None
    if settings.family is not None:
        try:
            header = read_family_header(settings.family)
            checkpoint = local_model(model)
            if checkpoint is not None:
                _check_model(checkpoint, header)
        except SafegeneError as error:
            faults.append(error)
    for path in _base_profiles(model, settings):
        try:
            _check_profile(path, header)
        except SafegeneError as error:
            faults.append(type(error)(f"{path}: {error}"))
    shapes: dict[str, Mapping[str, LoRAShape]] = {}
    for name, path in tenants.items():
        try:
            shapes[name] = _read_tenant(name, path, settings, header)
        except SafegeneError as error:
            text = str(error)
            named = text if f"tenant {name!r}" in text else f"tenant {name!r}: {text}"
            faults.append(type(error)(named))
    return Artifacts(header, shapes), faults


def read_declared(tenants: Mapping[str, Path], header: FamilyHeader | None) -> list[SafegeneError]:
    """Errors of the tenants in a registry's `tenants.directory`, each with the tenant's name.

    One without a profile is no error: the registry gives it one.
    """
    errors: list[SafegeneError] = []
    for name, directory in tenants.items():
        try:
            kind = slot_kind(directory)
            if has_profile(directory):
                _check_profile(directory, header)
            if kind != "profile":
                _check_sites(name, directory, read_adapter_shapes(directory), header)
        except SafegeneError as error:
            text = str(error)
            named = text if f"tenant {name!r}" in text else f"tenant {name!r}: {text}"
            errors.append(type(error)(named))
    return errors


def _base_profiles(model: str, settings: Settings) -> list[Path]:
    """Path of the profile of the base model, or of a full checkpoint."""
    if settings.apply != "weights":
        return [] if settings.base_profile is None else [settings.base_profile]
    if settings.profile is not None:
        return [settings.profile]
    return [Path(model)] if Path(model).is_dir() else []


def _check_model(model: Path, header: FamilyHeader) -> None:
    """Errors: FamilyMismatchError; models not on this machine are checked by the workers."""
    if model.is_file() or not any(model.glob("*.safetensors")):
        return
    base, wanted = base_of_checkpoint(model), header.base
    if base.fingerprint != wanted.fingerprint:
        raise FamilyMismatchError(
            f"family {header.name!r} ({header.digest}) is for {wanted.architecture}, "
            f"{wanted.num_layers} layers, {wanted.fingerprint}; the model {str(model)!r} is "
            f"{base.architecture}, {base.num_layers} layers, {base.fingerprint}. Serve a model of "
            "that family, or give the family of this model."
        )


def _check_profile(path: Path, header: FamilyHeader | None) -> None:
    if path.is_dir():
        reject_exported(path)
    profile = load_profile(path)
    if header is not None:
        check_profile(profile, header)


def _read_tenant(
    name: str, path: Path, settings: Settings, header: FamilyHeader | None
) -> Mapping[str, LoRAShape]:
    """A tenant's LoRA shapes by site; empty for a profile alone."""
    if not allowed(path, settings.adapter_roots).is_dir():
        raise AdapterRejectedError(f"tenant {name!r}: {path} is not a directory.")
    directory = check_readable(path, settings.adapter_roots)
    kind = slot_kind(directory)
    protected = has_profile(directory)
    if protected:
        _check_profile(directory, header)
    elif settings.missing_profile == "refuse":
        raise AdapterRejectedError(
            f"tenant {name!r} at {path} has no safegene.json, so it would be served unprotected. "
            "Give it a profile of this family, or allow tenants without one with "
            "--missing-profile serve_unprotected."
        )
    if kind == "profile":
        return {}
    shapes = read_adapter_shapes(directory)
    _check_sites(name, directory, shapes, header)
    return shapes


def _check_sites(
    name: str, directory: Path, shapes: Mapping[str, LoRAShape], header: FamilyHeader | None
) -> None:
    """Errors: AdapterRejectedError for sites outside the layers, or unlike the family's base."""
    problems = [
        f"{site} is in no layer (embeddings and lm_head are not supported)"
        for site in shapes
        if layer_of(site) is None
    ]
    if header is not None:
        problems += map(str, site_errors(directory, shapes, header))
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise AdapterRejectedError(f"tenant {name!r}: " + "; ".join(problems[:5]) + more + ".")
