"""The `serve:` part of a safegene.yaml: model, family and vLLM flags of `safegene serve`.

The server reads the rest of the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from safegene_vllm.errors import ConfigError, did_you_mean


class ConfigFile(BaseModel):
    """The engine to start. Relative paths are relative to the file.

    `vllm` has vLLM's flags by name, with `true` for a flag without value and `false` for its
    `--no-` form.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="directory or hub name of the base model")
    family: Path = Field(description="directory of the safety vector")
    apply: Literal["gain", "composed"] | None = Field(
        None, description="`gain` (default) or `composed`"
    )
    slots: int | None = Field(
        None, gt=0, description="LoRA slots on the device (vLLM's `--max-loras`)"
    )
    base_profile: Path | None = Field(
        None, description="profile of requests without an adapter; `gain` only"
    )
    vllm: dict[str, Any] = Field(
        default_factory=dict,
        description="any vLLM flags by name; `true` for a bare flag, `false` for its `--no-` form",
    )

    def flags(self) -> tuple[str, ...]:
        """Convert `vllm` to command-line arguments."""
        return tuple(word for name, value in self.vllm.items() for word in _flag(name, value))


def read_yaml(path: Path) -> Any:
    """Content of a settings file; errors leave out the line itself, which may hold a password.

    Errors: ConfigError.
    """
    import yaml

    from safegene_vllm.formats.yaml_file import load_yaml

    try:
        return load_yaml(path.read_text())
    except OSError as error:
        raise ConfigError(f"--server-config {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        what = getattr(error, "problem", None) or type(error).__name__
        raise ConfigError(f"--server-config {path}{where} is not YAML: {what}.") from None


def read_config_file(path: Path) -> ConfigFile:
    """Read the `serve:` part. Errors: ConfigError naming the file and every invalid key."""
    raw = read_yaml(path)
    part = raw.get("serve") if isinstance(raw, Mapping) else None
    if not isinstance(part, Mapping):
        raise ConfigError(
            f"--server-config {path} has no `serve:` part with model and family, and no MODEL is "
            "given; write `safegene serve MODEL --family DIR --server-config ...`, or add the part."
        )
    try:
        found = ConfigFile(**part)
    except ValidationError as error:
        problems = "; ".join(map(_problem, error.errors()))
        raise ConfigError(f"--server-config {path}: {problems}.") from None
    return found.model_copy(update=_resolved_paths(path.parent, found))


def _problem(error: Any) -> str:
    message = error["msg"]
    if error["type"] == "extra_forbidden":
        message = "unknown key" + did_you_mean(str(error["loc"][-1]), ConfigFile.model_fields)
    key = ".".join(map(str, error["loc"]))
    return f"serve.{key} = {error.get('input')!r:.200}: {message}"


def _resolved_paths(folder: Path, found: ConfigFile) -> dict[str, Any]:
    """Paths relative to `folder`. A model that is no directory there may be a Hub name."""
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
