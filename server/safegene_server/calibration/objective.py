"""Objective of a candidate: weighted mean log-probabilities, and a pull to the start.

    weights · (- mean log p(answer | prompt)) over the kinds  +  pull · mean (λ - λ_0)²

A kind's mean is over its examples, an example's over the tokens of its answer. The gradient recipe
uses KL to the untouched tenant; this uses the log-probability of given answers, because the engine
returns only the latter over HTTP. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from safegene_server.tenants.settings import CalibrationSettings

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


def objective_of(settings: CalibrationSettings, weights: Mapping[str, float]) -> Objective:
    return Objective(weights, settings.pull, settings.initial)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
