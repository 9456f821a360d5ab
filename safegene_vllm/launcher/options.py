"""What the user of `safegene serve` asked for, before anything is checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class ServeOptions:
    """What the user asked for. `vllm_args` are all flags that are not ours, in their order.

    `server_config` is the server's own file (registry, store, access); tenants are in it then.
    """

    model: str
    family: Path | None = None
    apply: str | None = None
    tenants: Mapping[str, Path] = field(default_factory=dict)
    base_profile: Path | None = None
    profile: Path | None = None
    adapter_roots: Sequence[Path] = ()
    missing_profile: str | None = None
    slots: int | None = None
    server_config: Path | None = None
    vllm_args: Sequence[str] = ()


def absolute(path: Path | None) -> str | None:
    """Absolute, because workers may start elsewhere; symbolic links stay, they are judged later."""
    return None if path is None else str(path.expanduser().absolute())
