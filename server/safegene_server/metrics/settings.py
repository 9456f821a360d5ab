"""What an operator decides about metrics. Values alone, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ConfigDict

from safegene_vllm.errors import ConfigError


@dataclass(frozen=True)
class MetricsSettings:
    """`max_tenants` tenants have series of their own, those named in `tenants` first of all; the
    rest share one. `refusals`: look for refusals in answers. `period_s`: how often what the engine
    and the registry say is read anew.
    """

    max_tenants: int = 100
    tenants: tuple[str, ...] = ()
    refusals: bool = True
    period_s: float = 15.0

    # pydantic's name: a key of a settings file that is none of these is refused.
    __pydantic_config__ = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        """Errors: ConfigError with every bad value."""
        faults = []
        if self.max_tenants < 0:
            faults.append(f"metrics.max_tenants = {self.max_tenants!r}, expected 0 or more")
        if len(set(self.tenants)) > max(0, self.max_tenants):
            faults.append(
                f"metrics.tenants names {len(set(self.tenants))} tenants, expected at most "
                f"metrics.max_tenants = {self.max_tenants}"
            )
        if not 1.0 <= self.period_s < float("inf"):
            faults.append(f"metrics.period_s = {self.period_s!r}, expected 1 or more")
        if faults:
            raise ConfigError("; ".join(faults) + ".")
