"""Smoke test: a few prompts to a revision that is not served yet, string rules, and thresholds.

It finds a tenant that has lost its refusals, refuses everything or is incoherent. It is no
evaluation, and a pass is no proof of safety.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from safegene_server.tenants.settings import GateSettings
from safegene_server.tenants.smoke_prompts import (
    JUDGES,
    ChatClient,
    Prompt,
    digest,
    generate_all,
    tally,
)
from safegene_vllm.errors import AdapterRejectedError


@dataclass(frozen=True)
class Outcome:
    """`reasons` is empty if and only if the revision may be served; `record` is for its row."""

    reasons: tuple[str, ...]
    record: dict[str, Any]

    @property
    def passed(self) -> bool:
        return not self.reasons


async def run_smoke_test(
    replica: ChatClient, model: str, prompts: Sequence[Prompt], settings: GateSettings
) -> Outcome:
    """Send all prompts to `model` (`tenant@N`, loaded) and compare with the thresholds.

    Errors: those of `generate_all`; AdapterRejectedError (the engine is too slow).
    """
    try:
        async with asyncio.timeout(settings.timeout_s):
            completions = await generate_all(
                replica,
                model,
                prompts,
                concurrent=settings.concurrent,
                max_tokens=settings.max_tokens,
                priority=settings.priority,
            )
    except TimeoutError:
        raise AdapterRejectedError(
            f"{model}: the smoke test's {len(prompts)} prompts took longer than "
            f"{settings.timeout_s:g} s; try again when the engine is less busy, or raise "
            "gate.timeout_s"
        ) from None
    return judge(prompts, completions, settings)


def judge(prompts: Sequence[Prompt], completions: Sequence[str], settings: GateSettings) -> Outcome:
    """Compare the counts of the completions with the thresholds."""
    found = tally(prompts, completions)
    harmful, lookalike = found.refused["harmful"], found.refused["lookalike"]
    reasons = []
    if harmful.share < settings.harmful_min_refused:
        reasons.append(
            f"refused {harmful} harmful prompts, expected a share of at least "
            f"{settings.harmful_min_refused:g} (gate.harmful_min_refused): raise the coefficients"
        )
    if lookalike.share > settings.lookalike_max_refused:
        reasons.append(
            f"refused {lookalike} harmless prompts that only sound harmful, "
            f"expected a share of at most {settings.lookalike_max_refused:g} "
            "(gate.lookalike_max_refused): lower the coefficients"
        )
    if found.coherent.share < settings.coherent_min:
        reasons.append(
            f"{found.coherent} completions are coherent, expected a share of at least "
            f"{settings.coherent_min:g} (gate.coherent_min): lower the coefficients, or look at "
            "the adapter"
        )
    record = {
        "passed": not reasons,
        **found.record(),
        "thresholds": {
            "harmful_min_refused": settings.harmful_min_refused,
            "lookalike_max_refused": settings.lookalike_max_refused,
            "coherent_min": settings.coherent_min,
        },
        "judges": list(JUDGES),
        "max_tokens": settings.max_tokens,
        "prompts": digest(prompts),
    }
    return Outcome(tuple(reasons), record)
