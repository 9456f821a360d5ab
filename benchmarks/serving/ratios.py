"""Medians, spreads, and ratios of two arms round by round. Numbers only.

A ratio is formed within one round, so a machine that drifts moves both sides; what is told is the
median over rounds with the least and the greatest.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from arms import Arm, comparisons

Metrics = Mapping[str, float | None]
Round = Mapping[str, Metrics]
"""By arm's name, one round's metrics."""
Spread = dict[str, float]

SPEED = "output_tokens_per_s"
FIRST, BETWEEN = "ttft_p50_ms", "itl_p50_ms"
DECODE_STEP, PROMPT_TOKEN = "decode_step_ms", "prompt_token_us"
COMPARED = (
    *(SPEED, "total_tokens_per_s", FIRST, "ttft_p99_ms", BETWEEN, "itl_p99_ms", "e2e_p50_ms"),
    *(DECODE_STEP, PROMPT_TOKEN),
)
"""What ratios are formed of, round by round."""
STARTS = ("start_s", "load_weights_s")
"""What ratios are formed of, start by start."""


def spread(values: Iterable[float]) -> Spread:
    """Median, least, greatest and count, four significant digits. Errors: ValueError if empty."""
    found = sorted(values)
    if not found:
        raise ValueError("no values, no median")
    told = {"median": statistics.median(found), "min": found[0], "max": found[-1]}
    return {name: float(f"{value:.4g}") for name, value in told.items()} | {"n": len(found)}


def ratio(arm: Sequence[float | None], base: Sequence[float | None]) -> Spread | None:
    """Spread of arm[k] / base[k]; rounds in which one of them is missing or 0 do not count."""
    pairs = [(a, b) for a, b in zip(arm, base, strict=False) if a is not None and b]
    return spread(a / b for a, b in pairs) if pairs else None


def series(rounds: Sequence[Round], arm: str, metric: str) -> list[float | None]:
    """One metric of one arm, a value per round."""
    return [found.get(arm, {}).get(metric) for found in rounds]


def medians(rounds: Sequence[Round], arm: str) -> dict[str, Spread]:
    """Spread of every metric that the arm has in any round."""
    metrics = dict.fromkeys(name for found in rounds for name in found.get(arm, {}))
    told = {
        metric: [value for value in series(rounds, arm, metric) if value is not None]
        for metric in metrics
    }
    return {metric: spread(values) for metric, values in told.items() if values}


def named_ratios(
    cell: str,
    arms: Sequence[Arm],
    rounds: Sequence[Round],
    starts: Sequence[Round],
    *,
    on_cpu: bool,
) -> dict[str, Any]:
    """`<cell>.<arm>_over_<other>.<metric>` -> spread, for everything that can be formed."""
    found: dict[str, Any] = {}
    for arm, other in comparisons(arms, on_cpu):
        for metrics, source in ((COMPARED, rounds), (STARTS, starts)):
            for metric in metrics:
                value = ratio(series(source, arm.name, metric), series(source, other.name, metric))
                if value is not None:
                    found[f"{cell}.{arm.name}_over_{other.name}.{metric}"] = value
    return found
