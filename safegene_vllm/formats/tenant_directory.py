"""The kind of a directory, and whether it fits a family. Torch-free.

Reads headers and descriptions only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from safegene_vllm.errors import (
    AdapterRejectedError,
    FamilyMismatchError,
    HeaderError,
    SafegeneError,
    raise_errors,
)
from safegene_vllm.formats.adapter import LoRAShape, read_adapter_shapes
from safegene_vllm.formats.family import FamilyHeader, base_of_checkpoint
from safegene_vllm.formats.file_io import read_json
from safegene_vllm.formats.metadata import DESCRIPTION_FILE
from safegene_vllm.formats.profile import has_profile
from safegene_vllm.formats.tenant_kind import TenantKind, tenant_kind
from safegene_vllm.formats.tensor_names import layer_of, spellings

RECORD_FILE = "safegene-export.json"
"""Written by `safegene export` next to weights that already contain a vector."""

Kind = TenantKind | Literal["family"]


def kind_of(directory: Path, *, new_profile: bool = False) -> Kind:
    """The kind of `directory`; an adapter or a checkpoint may come with a profile.

    `new_profile`: as for `tenant_kind`. Errors: those of `tenant_kind`, which rejects everything
    that is none of them; HeaderError if its safegene.json is of neither kind; what reading that
    file may raise.
    """
    directory = Path(directory)
    if has_profile(directory):
        kind = read_json(directory / DESCRIPTION_FILE).get("kind")
        if kind == "family":
            return "family"
        if kind != "profile":
            raise HeaderError(
                f"{directory / DESCRIPTION_FILE}: kind is {kind!r}, expected 'family' or 'profile'"
            )
    return tenant_kind(directory, new_profile=new_profile)


def _stack(site: str) -> tuple[str, int | None]:
    """Name of the list of layers that a site is in, such as `model.layers`, and its layer."""
    layer = layer_of(site)
    return ("", None) if layer is None else (site[: site.index(f".{layer}.")], layer)


def site_errors(
    directory: Path, shapes: Mapping[str, LoRAShape], header: FamilyHeader
) -> list[SafegeneError]:
    """Errors of an adapter whose modules are not in the family's base, or have other shapes.

    The family knows where the base's layers are, and the shapes of the modules with a vector.
    """
    errors: list[SafegeneError] = []
    stacks = {name for site in header.sites for name in spellings(_stack(site)[0])}
    for site, own in shapes.items():
        ours = next((header.sites[s] for s in spellings(site) if s in header.sites), None)
        stack, layer = _stack(site)
        if layer is not None and (stack not in stacks or layer >= header.num_layers):
            errors.append(
                FamilyMismatchError(
                    f"{directory}: the adapter is for {site!r:.200}, and the base of family "
                    f"{header.name!r} has layers 0 to {header.num_layers - 1} of "
                    f"{' and '.join(map(repr, sorted(stacks)))} only; was it trained on another "
                    "model, or saved from inside a wrapper?"
                )
            )
        elif ours is not None and (own.d_out, own.d_in) != (ours.d_out, ours.d_in):
            errors.append(
                FamilyMismatchError(
                    f"{directory}, {site}: the weight is {(own.d_out, own.d_in)}, in family "
                    f"{header.name!r} it is {(ours.d_out, ours.d_in)}"
                )
            )
    return errors


def check_fits(directory: Path, header: FamilyHeader, *, new_profile: bool = False) -> None:
    """Check that the content of `directory` fits the family of `header`.

    A checkpoint must have the base's fingerprint; an adapter the family's shapes at their common
    sites; a bare profile has no shapes. Errors: FamilyMismatchError naming both; those of
    `kind_of`; what reading the files may raise.
    """
    kind = kind_of(directory, new_profile=new_profile)
    if kind == "adapter":
        raise_errors(site_errors(directory, read_adapter_shapes(directory), header))
    elif kind == "checkpoint":
        base = base_of_checkpoint(directory)
        if base.fingerprint != header.base.fingerprint:
            raise FamilyMismatchError(
                f"{directory} is a {base.architecture} with {base.num_layers} layers, fingerprint "
                f"{base.fingerprint}; family {header.name!r} is for a {header.base.architecture} "
                f"with {header.base.num_layers} layers, fingerprint {header.base.fingerprint}"
            )
    elif kind == "family":
        raise AdapterRejectedError(f"{directory} is a family; name a tenant's directory")


def reject_exported(directory: Path) -> None:
    """Raise AdapterRejectedError if `directory` was exported: it already contains its vector."""
    if (Path(directory) / RECORD_FILE).exists():
        raise AdapterRejectedError(
            f"{directory} holds {RECORD_FILE}: a vector is already in these weights and would be "
            "added twice; start from the tenant they were exported from"
        )
