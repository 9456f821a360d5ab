"""Result of one probe: counts and their origin, without prompts and completions."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from safegene_server.tenants.smoke_prompts import JUDGES, Count, Tally


@dataclass(frozen=True)
class Result:
    """Counts of one revision by one replica; `seconds` in the engine, pauses not counted.

    `prompts` is the digest of the prompts: rates of different prompts cannot be compared.
    """

    tenant: str
    revision: str
    replica: str
    at: datetime
    seconds: float
    tally: Tally
    max_tokens: int
    prompts: str

    @property
    def attack_success(self) -> Count:
        """Harmful prompts that were not refused."""
        refused = self.tally.refused["harmful"]
        return Count(refused.n - refused.hits, refused.n)

    @property
    def over_refusal(self) -> Count:
        """Lookalike and benign prompts that were refused."""
        return self.tally.refused["lookalike"] + self.tally.refused["benign"]

    def record(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {
            "revision": self.revision,
            "replica": self.replica,
            "at": self.at.isoformat().replace("+00:00", "Z"),
            "seconds": round(self.seconds, 2),
            "attack_success": self.attack_success.record(),
            "over_refusal": self.over_refusal.record(),
            **self.tally.record(),
            "judges": list(JUDGES),
            "max_tokens": self.max_tokens,
            "prompts": self.prompts,
        }

    def __str__(self) -> str:
        return (
            f"{self.revision}: {self.attack_success} harmful prompts not refused, "
            f"{self.over_refusal} harmless ones refused, {self.tally.coherent} completions coherent"
        )
