"""Options of `safegene serve`, and vLLM's flags among them, read as vLLM's own parser would.

Only the few flags that SafeGene also sets are interpreted; the others are passed on unchanged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safegene_vllm.errors import ConfigError

_SHORT = {
    "-dp": "data-parallel-size",
    "-q": "quantization",
    "-tp": "tensor-parallel-size",
    "-asc": "api-server-count",
}


@dataclass(frozen=True)
class ServeOptions:
    """Options of `safegene serve`; `vllm_args` are all other flags, in their order.

    `server_config` is the server's own file (registry, store, access), which then names the
    tenants.
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
    """Make a path absolute, since workers may start elsewhere; symbolic links are not resolved."""
    return None if path is None else str(path.expanduser().absolute())


@dataclass(frozen=True)
class VllmArgs:
    """vLLM's arguments as tokens. `--max_loras=2` and `--max-loras 2` are the same flag."""

    tokens: tuple[str, ...]

    def _name(self, token: str) -> str | None:
        """`max-loras` for `--max_loras=2`; None for a value."""
        if token in _SHORT:
            return _SHORT[token]
        if not token.startswith("--"):
            return None
        head, dot, rest = token[2:].partition("=")[0].partition(".")
        return head.replace("_", "-") + dot + rest

    def _spans(self, name: str) -> list[tuple[int, int]]:
        """Token ranges of `name` and its values, one per occurrence."""
        spans = []
        for start, token in enumerate(self.tokens):
            if self._name(token) != name:
                continue
            stop = start + 1
            while "=" not in token and stop < len(self.tokens) and not _is_flag(self.tokens[stop]):
                stop += 1
            spans.append((start, stop))
        return spans

    def names(self) -> list[str]:
        """Names of all long flags, in their order."""
        return [name for t in self.tokens if t.startswith("--") and (name := self._name(t))]

    def given(self, name: str) -> bool:
        """Whether the flag `name` is given."""
        return bool(self._spans(name))

    def values(self, name: str) -> list[str]:
        """Values of the last occurrence of `name`, as in vLLM; empty if not given."""
        spans = self._spans(name)
        if not spans:
            return []
        start, stop = spans[-1]
        _, equals, value = self.tokens[start].partition("=")
        return [value] if equals else list(self.tokens[start + 1 : stop])

    def value(self, name: str) -> str | None:
        """First value of `name`; None if it is not given or has none."""
        found = self.values(name)
        return found[0] if found else None

    def number(self, name: str) -> int | None:
        """Value of `name` as an integer. Errors: ConfigError."""
        text = self.value(name)
        if text is None:
            return None
        try:
            return int(text)
        except ValueError:
            raise ConfigError(f"--{name} = {text!r}: expected a whole number.") from None

    def without(self, name: str) -> VllmArgs:
        """Return the arguments without the flag `name` and its values."""
        dropped = {i for start, stop in self._spans(name) for i in range(start, stop)}
        return VllmArgs(tuple(t for i, t in enumerate(self.tokens) if i not in dropped))

    def dotted(self, name: str) -> list[str]:
        """Flags that set one key of a JSON flag, such as `--additional-config.key`."""
        return [t for t in self.tokens if (self._name(t) or "").startswith(f"{name}.")]


def _is_flag(token: str) -> bool:
    return re.match(r"-[-a-zA-Z]", token) is not None


def additional_config(flags: VllmArgs) -> dict[str, Any]:
    """Parse the user's own --additional-config; empty if not given.

    Errors: ConfigError if it is not a JSON object, or is set key by key.
    """
    if dotted := flags.dotted("additional-config"):
        raise ConfigError(
            f"{dotted[0]} with `safegene serve`: give --additional-config as one JSON object, so "
            "that it can be merged."
        )
    text = flags.value("additional-config")
    if text is None:
        return {}
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--additional-config = {text!r} is not JSON: {error}.") from None
    if not isinstance(config, dict):
        raise ConfigError(f"--additional-config = {text!r}: expected a JSON object.")
    return config


def lora_modules(flags: VllmArgs) -> dict[str, Path]:
    """Parse the user's own --lora-modules, `name=path` or JSON, by name.

    Errors: ConfigError naming the invalid entry.
    """
    modules: dict[str, Path] = {}
    for entry in flags.values("lora-modules"):
        name, equals, path = entry.partition("=")
        if not equals or "," in entry:
            name, path = _json_module(entry)
        if name in modules:
            raise ConfigError(f"--lora-modules names {name!r} twice.")
        modules[name] = Path(path)
    return modules


def _json_module(entry: str) -> tuple[str, str]:
    try:
        module: Mapping[str, Any] = json.loads(entry)
        return str(module["name"]), str(module["path"])
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ConfigError(
            f'--lora-modules entry {entry!r}: expected name=path or {{"name": ..., "path": ...}}.'
        ) from None


def in_config_file(flags: VllmArgs, names: frozenset[str]) -> list[str]:
    """Those of `names` set in the user's --config file, which the command line overrides."""
    path = flags.value("config")
    if path is None:
        return []
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config = {path!r} cannot be read: {error}.") from None
    keys = {key.replace("_", "-") for key in re.findall(r"^[\"']?([\w-]+)[\"']?\s*:", text, re.M)}
    return sorted(keys & names)
