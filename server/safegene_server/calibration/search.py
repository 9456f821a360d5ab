"""Where to look: one scale for all layers first, then each layer around it by CMA-ES.

Asks for the losses of batches of candidates and knows nothing of engines or examples. The same seed
and the same losses give the same candidates, whatever runs side by side. The held-out loss decides
what is best and when to stop; the other one decides where to look next.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from cmaes import CMA

from safegene_server.calibration.objective import Evaluation, Vector
from safegene_vllm.errors import ConfigError

SPREAD = 5
"""Scales of the first round, from the least to the largest coefficient."""
NARROWED = 2
"""Rounds of four scales each, around the best so far, each a third as wide as the one before."""
SIGMA = 0.15
"""The first spread of CMA-ES, as a share of the room between the bounds."""
DIGITS = 4
LEAST_BUDGET = SPREAD

Evaluate = Callable[[Sequence[Vector], float], Awaitable[Sequence[Evaluation]]]
"""The candidates' losses, in their order; the held-out one too of whoever is below the given loss
and below all before it in the batch."""
Tell = Callable[[int, str], Awaitable[None]]
"""Called before each round with the candidates tried so far and what is being done. May raise."""


@dataclass(frozen=True)
class Space:
    """The least and the largest coefficient of every layer that carries a vector."""

    lower: Vector
    upper: Vector

    def __post_init__(self) -> None:
        """Errors: ConfigError if nothing can move."""
        if not self.free:
            raise ConfigError(
                "the family's bounds and its floor leave every coefficient one value; there is "
                "nothing to calibrate: lower the floor"
            )

    @property
    def free(self) -> list[int]:
        """The places that can move."""
        return [i for i, (low, high) in enumerate(self._pairs()) if low < high]

    def inside(self, values: Sequence[float]) -> Vector:
        """The nearest candidate: four digits, never outside."""
        return tuple(
            min(max(round(float(value), DIGITS), low), high)
            for value, (low, high) in zip(values, self._pairs(), strict=True)
        )

    def scaled(self, scale: float) -> Vector:
        return self.inside([scale] * len(self.lower))

    def _pairs(self) -> list[tuple[float, float]]:
        return list(zip(self.lower, self.upper, strict=True))


@dataclass
class Found:
    """How far a search is; `best` has the least held-out loss of all that was looked at."""

    best: Evaluation
    lowest: Evaluation
    tried: int = 0
    idle: int = 0
    rounds: list[dict[str, float]] = field(default_factory=list)
    _known: dict[Vector, Evaluation] = field(default_factory=dict)


async def search(
    space: Space,
    evaluate: Evaluate,
    first: Sequence[Evaluation],
    *,
    budget: int,
    patience: int,
    seed: int,
    tell: Tell,
) -> Found:
    """The best candidate within `budget` new ones; `first` have been looked at already, and one
    of them at least lies in the space.

    Stops after `patience` rounds without a lower held-out loss. Errors: what the calls raise.
    """
    inside = [look for look in first if look.at == space.inside(look.at)]
    found = Found(min(inside, key=_held), min(inside, key=lambda look: look.loss))
    found._known = {look.at: look for look in first}

    async def ask(candidates: Sequence[Vector], what: str) -> list[Evaluation] | None:
        """All of their looks, or None if there is no budget for them; nothing is tried twice."""
        fresh = [at for at in dict.fromkeys(candidates) if at not in found._known]
        if found.tried + len(fresh) > budget:
            return None
        await tell(found.tried, what)
        before = found.best
        looks = await evaluate(fresh, found.lowest.loss) if fresh else ()
        for look in looks:
            found._known[look.at] = look
            found.lowest = min(found.lowest, look, key=lambda each: each.loss)
            found.best = min(found.best, look, key=_held)
        found.tried += len(fresh)
        found.idle = 0 if found.best is not before else found.idle + 1
        found.rounds.append({"tried": found.tried, "held_out": round(_held(found.best), 6)})
        return [found._known[at] for at in candidates]

    await _scale(space, ask)
    found.idle = 0
    if len(space.free) > 1:
        await _layers(space, ask, found, patience, seed)
    return found


Ask = Callable[[Sequence[Vector], str], Awaitable[list[Evaluation] | None]]


async def _scale(space: Space, ask: Ask) -> None:
    """One number for all layers: spread out, then narrowed around the best."""
    low, high = min(space.lower), max(space.upper)
    width = (high - low) / (SPREAD - 1)
    scales = [low + width * i for i in range(SPREAD)]
    best: tuple[float, float] | None = None
    for turn in range(1 + NARROWED):
        looks = await ask([space.scaled(s) for s in scales], "looking for one scale")
        if looks is None:
            return
        tried = [(look.loss, scale) for look, scale in zip(looks, scales, strict=True)]
        best = min(tried if best is None else [best, *tried])
        width = width / 3 if turn else width / 1.5
        around = (-width, -width / 2, width / 2, width)
        scales = [min(max(best[1] + step, low), high) for step in around]


async def _layers(space: Space, ask: Ask, found: Found, patience: int, seed: int) -> None:
    """Every layer on its own, around the best so far."""
    free = space.free
    low = np.array([space.lower[i] for i in free])
    room = np.array([space.upper[i] for i in free]) - low
    mean = (np.array([space.inside(found.lowest.at)[i] for i in free]) - low) / room
    bounds = np.array([[0.0, 1.0]] * len(free))
    optimizer = CMA(mean=mean, sigma=SIGMA, bounds=bounds, seed=seed % 2**32)
    while found.idle < patience and not optimizer.should_stop():
        points = [optimizer.ask() for _ in range(optimizer.population_size)]
        candidates = []
        for point in points:
            values = list(space.lower)
            for place, value in zip(free, low + point * room, strict=True):
                values[place] = float(value)
            candidates.append(space.inside(values))
        looks = await ask(candidates, "looking around it, layer by layer")
        if looks is None:
            return
        optimizer.tell([(point, look.loss) for point, look in zip(points, looks, strict=True)])


def _held(look: Evaluation) -> float:
    return float("inf") if look.held is None else look.held
