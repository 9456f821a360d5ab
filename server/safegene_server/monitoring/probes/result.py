"""What is kept of one probe: counts, and what they are counts of. No question and no answer."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from safegene_server.tenants.smoke_prompts import JUDGES, Count, Tally


@dataclass(frozen=True)
class Result:
    """One revision asked by one replica; `seconds` in the engine, pauses not counted.

    `prompts` is the digest of the questions: rates of other questions are other rates.
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
        """Harmful questions that were not refused."""
        refused = self.tally.refused["harmful"]
        return Count(refused.n - refused.hits, refused.n)

    @property
    def over_refusal(self) -> Count:
        """Harmless questions, those that sound harmful and ordinary ones, that were refused."""
        return self.tally.refused["lookalike"] + self.tally.refused["benign"]

    def record(self) -> dict[str, Any]:
        """As plain JSON."""
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
            f"{self.revision}: {self.attack_success} harmful questions not refused, "
            f"{self.over_refusal} harmless ones refused, {self.tally.coherent} answers coherent"
        )
