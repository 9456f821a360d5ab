"""What the numbers should be, as bounds on named ratios, and whether they are.

A ratio that was not measured is told as missing, never as met.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ratios import BETWEEN, DECODE_STEP, FIRST, PROMPT_TOKEN, SPEED


@dataclass(frozen=True)
class Aim:
    """`low` and `high` bound the median of the ratio called `ratio`; None is no bound."""

    what: str
    ratio: str
    low: float | None = None
    high: float | None = None

    @property
    def bound(self) -> str:
        if self.low is not None and self.high is not None:
            return f"{self.low:g} to {self.high:g}"
        return f"at least {self.low:g}" if self.low is not None else f"at most {self.high:g}"

    def judged(self, ratios: Mapping[str, Any]) -> dict[str, Any]:
        """The aim with what was found and `met`: true, false, or None where nothing was."""
        found = ratios.get(self.ratio)
        met = None
        if found is not None:
            value = found["median"]
            met = (self.low is None or value >= self.low) and (
                self.high is None or value <= self.high
            )
        return {
            "what": self.what,
            "ratio": self.ratio,
            "bound": self.bound,
            "found": found,
            "met": met,
        }


def aims(on_cpu: bool) -> tuple[Aim, ...]:
    half, whole = "paired.gain_50_over_aside_50", "paired.gain_100_over_aside_100"
    by_hand = "exported_100" if on_cpu else "exported_stock_100"
    told = [
        Aim("gain table on half of the layers, throughput", f"{half}.{SPEED}", low=0.98),
        Aim("gain table on half of the layers, first token", f"{half}.{FIRST}", high=1.03),
        Aim("gain table on half of the layers, between tokens", f"{half}.{BETWEEN}", high=1.03),
        Aim(
            "gain table on half of the layers, a prompt token",
            f"{half}.{PROMPT_TOKEN}",
            high=1.03,
        ),
        Aim("gain table on half of the layers, a decode step", f"{half}.{DECODE_STEP}", high=1.03),
        Aim("gain table on all layers, throughput", f"{whole}.{SPEED}", low=0.95),
        Aim(
            "64 distinct profiles against 1, throughput",
            f"profiles.gain_100_over_gain_100_p1.{SPEED}",
            low=0.98,
        ),
        *(
            Aim(
                f"gain table over adapters merged by hand, throughput{where}",
                f"{cell}.gain_100_over_{by_hand}.{SPEED}",
                low=1.2,
            )
            for cell, where in (("by_hand", ""), ("by_hand_large", ", 8 tenants of rank 64"))
        ),
        Aim(
            "weight load over the merged checkpoint, throughput",
            f"checkpoint.weights_100_over_reloaded_100.{SPEED}",
            low=0.99,
            high=1.01,
        ),
        Aim(
            "weight load over the merged checkpoint, seconds to load weights",
            "checkpoint.weights_100_over_merged_100.load_weights_s",
            high=1.10,
        ),
    ]
    if on_cpu:
        over = "main.lora_over_lora_stock"
        told += [
            Aim("our LoRA product over the host's, first token", f"{over}.{FIRST}", high=0.2),
            Aim("our LoRA product over the host's, between tokens", f"{over}.{BETWEEN}", high=0.77),
        ]
    return tuple(told)
