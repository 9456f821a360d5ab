"""The `serve:` part of a safegene.yaml: the engine to start, so that one file says it all.

For `safegene serve --server-config safegene.yaml`. The rest of that file is the server's own and is
read there; what it says is not known here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from safegene_vllm.errors import ConfigError


class ConfigFile(BaseModel):
    """What to start. Relative paths are counted from the file; `vllm` holds flags of vLLM by name,
    with `true` for a flag alone and `false` for its `--no-` form."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    family: Path
    apply: Literal["gain", "composed"] | None = None
    slots: int | None = Field(None, gt=0)
    base_profile: Path | None = None
    vllm: dict[str, Any] = Field(default_factory=dict)

    def flags(self) -> tuple[str, ...]:
        """`vllm` as words of a command line."""
        return tuple(word for name, value in self.vllm.items() for word in _flag(name, value))


def read_config_file(path: Path) -> ConfigFile:
    """Errors: ConfigError naming the file and every bad key of its `serve:` part."""
    import yaml

    try:
        raw = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"--server-config {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        # Without the line itself: the file may hold a password.
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        what = getattr(error, "problem", None) or type(error).__name__
        raise ConfigError(f"--server-config {path}{where} is no YAML: {what}.") from None
    part = raw.get("serve") if isinstance(raw, Mapping) else None
    if not isinstance(part, Mapping):
        raise ConfigError(
            f"--server-config {path} has no `serve:` part with model and family, and no MODEL is "
            "given; write `safegene serve MODEL --family DIR --server-config ...`, or add the part."
        )
    try:
        found = ConfigFile(**part)
    except ValidationError as error:
        faults = "; ".join(
            f"serve.{'.'.join(map(str, fault['loc']))} = {fault.get('input')!r:.200}: "
            f"{fault['msg']}"
            for fault in error.errors()
        )
        raise ConfigError(f"--server-config {path}: {faults}.") from None
    return found.model_copy(update=_below(path.parent, found))


def _below(folder: Path, found: ConfigFile) -> dict[str, Any]:
    """The paths of a file in `folder`. A model that is no directory there may be a hub's name."""
    paths: dict[str, Any] = {"family": folder / found.family}
    if found.base_profile is not None:
        paths["base_profile"] = folder / found.base_profile
    if (folder / found.model).is_dir():
        paths["model"] = str(folder / found.model)
    return paths


def _flag(name: str, value: Any) -> Iterator[str]:
    flag = name.lstrip("-").replace("_", "-")
    if isinstance(value, bool):
        yield f"--{flag}" if value else f"--no-{flag}"
        return
    yield f"--{flag}"
    if isinstance(value, list):
        yield from map(str, value)
    else:
        yield json.dumps(value) if isinstance(value, Mapping) else str(value)
