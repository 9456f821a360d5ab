"""Settings of probes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict

from safegene_vllm.errors import ConfigError


@dataclass(frozen=True)
class ProbeSettings:
    """Probes of each of `tenants` (none named: all) every `every_s`; `prompts` None: shipped.

    `concurrent` prompts run at a time, in at most `share` of the engine's time; those that take
    longer than `timeout_s` are cancelled. `priority` is sent where the engine schedules by
    priority (larger runs later).
    """

    enabled: bool = False
    every_s: float = 21600.0
    share: float = 0.05
    concurrent: int = 4
    max_tokens: int = 48
    timeout_s: float = 120.0
    prompts: Path | None = None
    priority: int = 1000
    tenants: tuple[str, ...] = ()

    # Read by pydantic: an unknown key of a settings file is rejected.
    __pydantic_config__ = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        """Errors: ConfigError with every bad value."""
        problems = [
            f"probes.{name} = {getattr(self, name)!r}, expected more than 0"
            for name in ("every_s", "concurrent", "max_tokens", "timeout_s")
            if not 0 < getattr(self, name) < float("inf")
        ]
        if not 0.0 < self.share <= 1.0:
            problems.append(f"probes.share = {self.share!r}, expected more than 0, at most 1")
        if problems:
            raise ConfigError("; ".join(problems) + ".")
