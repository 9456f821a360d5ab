"""What an operator decides about probes. Values alone, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict

from safegene_vllm.errors import ConfigError


@dataclass(frozen=True)
class ProbeSettings:
    """Each of `tenants` (none named: all) is asked `prompts` (none: the shipped ones) every
    `every_s`, `concurrent` questions together, in at most `share` of the engine's time.

    `priority` goes with every question where the engine schedules by priority (larger comes
    later). Questions asked together that take longer than `timeout_s` are given up.
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

    # pydantic's name: a key of a settings file that is none of these is refused.
    __pydantic_config__ = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        """Errors: ConfigError with every bad value."""
        faults = [
            f"probes.{name} = {getattr(self, name)!r}, expected more than 0"
            for name in ("every_s", "concurrent", "max_tokens", "timeout_s")
            if not 0 < getattr(self, name) < float("inf")
        ]
        if not 0.0 < self.share <= 1.0:
            faults.append(f"probes.share = {self.share!r}, expected more than 0, at most 1")
        if faults:
            raise ConfigError("; ".join(faults) + ".")
