"""A tiny family and tenants of it on disk, for the tests of the server's artifacts.

Not a conftest: tests import what they use by name.
"""

from __future__ import annotations

from pathlib import Path

from format_files import SITES, tiny_family, tiny_lora

from safegene_vllm.formats.adapter import Adapter, save_adapter
from safegene_vllm.formats.family import FamilyHeader
from safegene_vllm.formats.profile import Profile, make_profile, save_profile

FAMILY: FamilyHeader = tiny_family().header
FILES = ("adapter_config.json", "adapter_model.safetensors")


def a_profile(value: float = 1.0) -> Profile:
    return make_profile(FAMILY, value, {"method": "test"})


def a_tenant(directory: Path, *, start: int = 1, profile: float | None = None) -> Path:
    """An adapter on one site of the family, other weights for another `start`."""
    save_adapter(Adapter({SITES[0]: tiny_lora(start)}, None, {}), directory, base_model=None)
    if profile is not None:
        save_profile(a_profile(profile), directory)
    return directory


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def tree(root: Path) -> list[str]:
    """Every file and directory below a store's root but its lock and its three directories."""
    top_level = {"lock", "adapters", "revisions", "incoming"}
    return sorted(
        name for p in root.rglob("*") if (name := str(p.relative_to(root))) not in top_level
    )
