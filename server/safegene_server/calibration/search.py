"""Search of coefficients: one scale for all layers first, then each layer around it by CMA-ES.

Requests losses of batches of candidates; independent of engines and examples. The same seed
and the same losses give the same candidates, whatever runs side by side. The held-out loss decides
what is best and when to stop; the other one drives the search. The loss of a candidate:

    weights · (- mean log p(answer | prompt)) over the kinds  +  pull · mean (λ - λ_0)²

A kind's mean is over its examples, an example's over the tokens of its answer. The gradient recipe
uses KL to the untouched tenant; this uses the log-probability of given answers, because the engine
returns only the latter over HTTP.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from cmaes import CMA

from safegene_vllm.errors import ConfigError

SPREAD = 5
"""Scales of the first round, from the least to the largest coefficient."""
NARROWED = 2
"""Rounds of four scales each, around the best so far, each a third as wide as the one before."""
SIGMA = 0.15
"""The first spread of CMA-ES, as a share of the distance between the bounds."""
DIGITS = 4
MIN_BUDGET = SPREAD

Vector = tuple[float, ...]
"""One coefficient per layer that carries a vector, in the family's order."""
Losses = Mapping[str, float]
"""Mean negative log-probability per kind."""


@dataclass(frozen=True)
class Evaluation:
    """Losses of one candidate.

    `loss` is on the searched examples, with the pull; `held` and `parts` are on the held-out ones,
    None if not evaluated.
    """

    at: Vector
    loss: float
    held: float | None = None
    parts: Losses | None = None


@dataclass(frozen=True)
class Objective:
    weights: Mapping[str, float]
    pull: float
    initial: float

    def held(self, losses: Losses) -> float:
        return sum(self.weights[kind] * loss for kind, loss in losses.items())

    def searched(self, losses: Losses, at: Vector) -> float:
        away = sum((value - self.initial) ** 2 for value in at) / len(at)
        return self.held(losses) + self.pull * away


Evaluate = Callable[[Sequence[Vector], float], Awaitable[Sequence[Evaluation]]]
"""The candidates' losses, in their order; the held-out one too for each below the given loss
and below all before it in the batch."""
Progress = Callable[[int, str], Awaitable[None]]
"""Called before each round with the number of candidates tried and the current step. May raise."""


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
        """Indices of the coefficients that can move."""
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
    """State of a search; `best` has the lowest held-out loss of all evaluated candidates."""

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
    progress: Progress,
) -> Found:
    """The best candidate within `budget` new ones.

    `first` are already evaluated, and at least one of them lies in the space.

    Stops after `patience` rounds without a lower held-out loss. Errors: what the calls raise.
    """
    inside = [evaluation for evaluation in first if evaluation.at == space.inside(evaluation.at)]
    found = Found(min(inside, key=_held), min(inside, key=lambda evaluation: evaluation.loss))
    found._known = {evaluation.at: evaluation for evaluation in first}

    async def evaluate_batch(candidates: Sequence[Vector], what: str) -> list[Evaluation] | None:
        """Evaluations of all, or None beyond the budget; no candidate is evaluated twice."""
        fresh = [at for at in dict.fromkeys(candidates) if at not in found._known]
        if found.tried + len(fresh) > budget:
            return None
        await progress(found.tried, what)
        before = found.best
        evaluations = await evaluate(fresh, found.lowest.loss) if fresh else ()
        for evaluation in evaluations:
            found._known[evaluation.at] = evaluation
            found.lowest = min(found.lowest, evaluation, key=lambda each: each.loss)
            found.best = min(found.best, evaluation, key=_held)
        found.tried += len(fresh)
        found.idle = 0 if found.best is not before else found.idle + 1
        found.rounds.append({"tried": found.tried, "held_out": round(_held(found.best), 6)})
        return [found._known[at] for at in candidates]

    await _scale(space, evaluate_batch)
    found.idle = 0
    if len(space.free) > 1:
        await _layers(space, evaluate_batch, found, patience, seed)
    return found


EvaluateBatch = Callable[[Sequence[Vector], str], Awaitable[list[Evaluation] | None]]


async def _scale(space: Space, evaluate_batch: EvaluateBatch) -> None:
    """One number for all layers: spread out, then narrowed around the best."""
    low, high = min(space.lower), max(space.upper)
    width = (high - low) / (SPREAD - 1)
    scales = [low + width * i for i in range(SPREAD)]
    best: tuple[float, float] | None = None
    for turn in range(1 + NARROWED):
        evaluations = await evaluate_batch([space.scaled(s) for s in scales], "searching one scale")
        if evaluations is None:
            return
        tried = [
            (evaluation.loss, scale) for evaluation, scale in zip(evaluations, scales, strict=True)
        ]
        best = min(tried if best is None else [best, *tried])
        width = width / 3 if turn else width / 1.5
        around = (-width, -width / 2, width / 2, width)
        scales = [min(max(best[1] + step, low), high) for step in around]


async def _layers(
    space: Space, evaluate_batch: EvaluateBatch, found: Found, patience: int, seed: int
) -> None:
    """Every layer on its own, around the best so far."""
    free = space.free
    low = np.array([space.lower[i] for i in free])
    width = np.array([space.upper[i] for i in free]) - low
    mean = (np.array([space.inside(found.lowest.at)[i] for i in free]) - low) / width
    bounds = np.array([[0.0, 1.0]] * len(free))
    optimizer = CMA(mean=mean, sigma=SIGMA, bounds=bounds, seed=seed % 2**32)
    while found.idle < patience and not optimizer.should_stop():
        points = [optimizer.ask() for _ in range(optimizer.population_size)]
        candidates = []
        for point in points:
            values = list(space.lower)
            for place, value in zip(free, low + point * width, strict=True):
                values[place] = float(value)
            candidates.append(space.inside(values))
        evaluations = await evaluate_batch(candidates, "searching layer by layer")
        if evaluations is None:
            return
        optimizer.tell(
            [
                (point, evaluation.loss)
                for point, evaluation in zip(points, evaluations, strict=True)
            ]
        )


def _held(evaluation: Evaluation) -> float:
    return float("inf") if evaluation.held is None else evaluation.held
