"""What the demo serves: the parent, one tenant's full checkpoint, and the others in three doses.

For making `build/smollm2/` from the small files checked in beside this one. Skips what is there.
Nothing is trained here; make_family.py did that.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from base import merge_adapter, write_base
from safegene_vllm.formats.family import read_family_header
from safegene_vllm.formats.profile import load_profile, make_profile, save_profile

HERE = Path(__file__).resolve().parent
FAMILY = HERE / "family"
TENANTS = HERE / "tenants"
DOSES = ("unprotected", "protected", "too strong")
SLOT_TENANTS = ("sentiment", "topic", "writer")
FULL_TENANT = "support"
TOO_STRONG = 3.0


@dataclass(frozen=True)
class World:
    """Directories ready to serve."""

    base: Path
    parent: Path
    full: Path
    doses: Path

    def tenant(self, name: str, dose: str) -> Path:
        return self.doses / served_name(name, dose)


def served_name(tenant: str, dose: str) -> str:
    """The model name of a tenant in one dose: the protected one bears the tenant's own name."""
    return tenant if dose == "protected" else f"{tenant}-{dose.replace(' ', '-')}"


def build_world(build: Path) -> World:
    """Write every directory of the demo below `build` that is not there yet."""
    root = build / "smollm2"
    base = write_base(root / "base")
    parent = merge_adapter(base, HERE / "parent", root / "parent")
    full = merge_adapter(parent, TENANTS / FULL_TENANT, root / FULL_TENANT)
    world = World(base, parent, full, root / "tenants")
    for name in SLOT_TENANTS:
        for dose in DOSES:
            _write_dose(name, dose, world.tenant(name, dose))
    return world


def write_full_dose(world: World, dose: str) -> None:
    """Put the profile of `dose` beside the full checkpoint."""
    header = read_family_header(FAMILY)
    profile = load_profile(TENANTS / FULL_TENANT)
    if dose == "unprotected":
        profile = make_profile(header, 0.0, {"method": "demo", "dose": dose})
    save_profile(profile, world.full)


def _write_dose(name: str, dose: str, target: Path) -> None:
    """A tenant's adapter as it is, with the coefficients of one dose."""
    header = read_family_header(FAMILY)
    profile = load_profile(TENANTS / name)
    if dose != "protected":
        value = 0.0 if dose == "unprotected" else TOO_STRONG
        profile = make_profile(header, value, {"method": "demo", "dose": dose})
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(TENANTS / name, target)
    (target / "safegene.json").unlink()
    save_profile(profile, target)
