"""The search without an engine: it finds the least of a known function, within its bounds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest

from safegene_server.calibration.search import Evaluation, Found, Space, Vector, search
from safegene_vllm.errors import ConfigError

Loss = Callable[[Vector], float]


class Losses:
    """Evaluates, and records every candidate it was given."""

    def __init__(self, loss: Loss, held: Loss | None = None) -> None:
        self.loss, self.held = loss, held or loss
        self.requested: list[Vector] = []
        self.reports: list[tuple[int, str]] = []

    def evaluate_one(self, at: Vector) -> Evaluation:
        return Evaluation(at, self.loss(at), self.held(at))

    async def __call__(self, candidates: Sequence[Vector], below: float) -> list[Evaluation]:
        self.requested += candidates
        looks = []
        for at in candidates:
            loss = self.loss(at)
            looks.append(Evaluation(at, loss, self.held(at) if loss < below else None))
            below = min(below, loss)
        return looks

    async def progress(self, tried: int, what: str) -> None:
        self.reports.append((tried, what))


def found(
    losses: Losses, space: Space, *, budget: int = 400, patience: int = 8, seed: int = 0
) -> Found:
    first = [losses.evaluate_one(space.scaled(0.0))]
    return asyncio.run(
        search(
            space,
            losses,
            first,
            budget=budget,
            patience=patience,
            seed=seed,
            progress=losses.progress,
        )
    )


def bowl(*best: float) -> Loss:
    return lambda at: sum((a - b) ** 2 for a, b in zip(at, best, strict=True))


@pytest.mark.parametrize("best", [(1.5, 0.5), (0.3, 2.2, 1.1), (1.0, 1.0, 1.0, 2.0)])
def test_the_optimum_is_found(best: tuple[float, ...]) -> None:
    space = Space((0.0,) * len(best), (3.0,) * len(best))
    losses = Losses(bowl(*best))
    result = found(losses, space)
    assert result.best.at == pytest.approx(best, abs=0.1)
    assert len(losses.requested) == result.tried <= 400
    assert len(set(losses.requested)) == len(losses.requested), "nothing is tried twice"
    assert {what for _, what in losses.reports} == {
        "searching one scale",
        "searching layer by layer",
    }


def test_one_layer_needs_no_more_than_the_scale() -> None:
    losses = Losses(bowl(1.3))
    result = found(losses, Space((0.0,), (3.0,)))
    assert result.best.at == pytest.approx((1.3,), abs=0.1) and result.tried <= 13


def test_candidates_outside_the_bounds_are_never_evaluated() -> None:
    losses = Losses(bowl(9.0, -9.0, 1.0))
    space = Space((0.0, 0.7, 0.0), (2.0, 2.0, 2.0))
    result = found(losses, space)
    assert result.best.at == pytest.approx((2.0, 0.7, 1.0), abs=0.1)
    for at in losses.requested:
        assert all(
            low <= v <= high for low, v, high in zip(space.lower, at, space.upper, strict=True)
        )


def test_a_layer_that_cannot_move_stays_where_it_is() -> None:
    losses = Losses(bowl(0.0, 1.0, 1.5))
    result = found(losses, Space((2.0, 0.0, 0.0), (2.0, 2.0, 2.0)))
    assert result.best.at[0] == 2.0
    assert result.best.at[1:] == pytest.approx((1.0, 1.5), abs=0.1)
    with pytest.raises(ConfigError, match="lower the floor"):
        Space((2.0, 1.0), (2.0, 1.0))


@pytest.mark.parametrize("budget", [5, 9, 17, 40])
def test_the_budget_is_respected(budget: int) -> None:
    losses = Losses(bowl(1.5, 0.5))
    result = found(losses, Space((0.0, 0.0), (3.0, 3.0)), budget=budget)
    assert 4 <= len(losses.requested) == result.tried <= budget
    assert result.best.held == min(losses.held(at) for at in losses.requested)


def test_the_seed_decides() -> None:
    def run(seed: int) -> list[Vector]:
        losses = Losses(bowl(1.5, 0.5, 1.0))
        found(losses, Space((0.0,) * 3, (3.0,) * 3), seed=seed, budget=60)
        return losses.requested

    assert run(3) == run(3) != run(4)


def test_it_stops_when_what_was_held_out_gets_no_better() -> None:
    """The examples searched on would improve further; the others are best at 1."""
    losses = Losses(bowl(2.6, 2.6), held=bowl(1.0, 1.0))
    result = found(losses, Space((0.0, 0.0), (3.0, 3.0)), patience=3)
    assert result.tried < 60
    assert result.best.held is not None and result.lowest.held is not None
    assert result.best.held < result.lowest.held
    assert (
        result.best.at
        == min(
            (look for look in result._known.values() if look.held is not None),
            key=lambda look: look.held or 0.0,
        ).at
    )


def test_nothing_better_is_no_error() -> None:
    losses = Losses(bowl(0.0, 0.0))
    assert found(losses, Space((0.0, 0.0), (3.0, 3.0))).best.at == (0.0, 0.0)
