"""Files that the demo serves: the parent, one full checkpoint, and tenants at three strengths.

Made in `build/smollm2/` from the checked-in files; nothing is trained here.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from examples.smollm2.base_model import merge_adapter, write_base
from safegene_vllm.formats.family import read_family_header
from safegene_vllm.formats.profile import load_profile, make_profile, save_profile

HERE = Path(__file__).resolve().parent
FAMILY = HERE / "family"
TENANTS = HERE / "tenants"
STRENGTHS = ("unprotected", "protected", "too strong")
SLOT_TENANTS = ("sentiment", "topic", "writer")
FULL_TENANT = "support"
TOO_STRONG = 3.0


@dataclass(frozen=True)
class DemoFiles:
    """Directories ready to serve."""

    base: Path
    parent: Path
    full: Path
    tenants: Path

    def tenant(self, name: str, strength: str) -> Path:
        return self.tenants / served_name(name, strength)


def served_name(tenant: str, strength: str) -> str:
    """Model name of a tenant at one strength; the protected one has the tenant's own name."""
    return tenant if strength == "protected" else f"{tenant}-{strength.replace(' ', '-')}"


def build_files(build: Path) -> DemoFiles:
    """Write every missing directory of the demo below `build`."""
    root = build / "smollm2"
    base = write_base(root / "base")
    parent = merge_adapter(base, HERE / "parent", root / "parent")
    full = merge_adapter(parent, TENANTS / FULL_TENANT, root / FULL_TENANT)
    files = DemoFiles(base, parent, full, root / "tenants")
    for name in SLOT_TENANTS:
        for strength in STRENGTHS:
            _write_tenant(name, strength, files.tenant(name, strength))
    return files


def write_full_profile(files: DemoFiles, strength: str) -> None:
    """Write the profile of `strength` into the full checkpoint."""
    header = read_family_header(FAMILY)
    profile = load_profile(TENANTS / FULL_TENANT)
    if strength == "unprotected":
        profile = make_profile(header, 0.0, {"method": "demo", "strength": strength})
    save_profile(profile, files.full)


def _write_tenant(name: str, strength: str, target: Path) -> None:
    """Copy a tenant's adapter with the coefficients of one strength."""
    header = read_family_header(FAMILY)
    profile = load_profile(TENANTS / name)
    if strength != "protected":
        value = 0.0 if strength == "unprotected" else TOO_STRONG
        profile = make_profile(header, value, {"method": "demo", "strength": strength})
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(TENANTS / name, target)
    (target / "safegene.json").unlink()
    save_profile(profile, target)
