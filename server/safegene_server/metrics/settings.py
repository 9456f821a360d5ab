"""Settings of metrics."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ConfigDict

from safegene_vllm.errors import ConfigError


@dataclass(frozen=True)
class MetricsSettings:
    """Metrics of one process.

    `max_tenants` tenants have series of their own, those named in `tenants` first; the rest share
    one. `refusals`: detect refusals in completions. `period_s`: interval of reading the engine's
    receipts and the registry.
    """

    max_tenants: int = 100
    tenants: tuple[str, ...] = ()
    refusals: bool = True
    period_s: float = 15.0

    # Read by pydantic: an unknown key of a settings file is rejected.
    __pydantic_config__ = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        """Errors: ConfigError with every bad value."""
        problems = []
        if self.max_tenants < 0:
            problems.append(f"metrics.max_tenants = {self.max_tenants!r}, expected 0 or more")
        if len(set(self.tenants)) > max(0, self.max_tenants):
            problems.append(
                f"metrics.tenants names {len(set(self.tenants))} tenants, expected at most "
                f"metrics.max_tenants = {self.max_tenants}"
            )
        if not 1.0 <= self.period_s < float("inf"):
            problems.append(f"metrics.period_s = {self.period_s!r}, expected 1 or more")
        if problems:
            raise ConfigError("; ".join(problems) + ".")
