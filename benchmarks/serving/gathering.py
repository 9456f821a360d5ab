"""The result of a run as one JSON value, from what is kept: medians, ratios, predictions, aims.

For the JSON line, the tables and the page, which read nothing else. Measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aims import aims
from cells import Cell
from kept import Kept
from predicted import predicted_ratios, sizes_of
from random_world import World
from ratios import medians, named_ratios

Result = dict[str, Any]


def cell_result(cell: Cell, kept: Kept) -> Result | None:
    """Settings and, by arm, spreads of its rounds, starts and what came after; None if unmeasured.

    A cell that was cut off counts with its whole rounds.
    """
    rounds, starts = kept.rounds(cell), kept.rounds(cell, "start")
    if not rounds:
        return None
    after = [*kept.rounds(cell, "after"), {}][0]
    arms = {}
    for arm in cell.arms:
        more = {name: value for name, value in after.get(arm.name, {}).items() if value is not None}
        arms[arm.name] = {
            "title": arm.title,
            "rounds": medians(rounds, arm.name),
            "starts": medians(starts, arm.name),
            "after": {name: float(f"{value:.6g}") for name, value in more.items()},
        }
    commit = kept.origin["commit"]
    return {"commit": commit, "settings": cell.settings(), "rounds": len(rounds), "arms": arms}


def gather(
    cells: Sequence[Cell],
    kept: Kept,
    worlds: Mapping[str, World],
    *,
    on_cpu: bool,
    short: bool,
) -> Result:
    """Everything about `cells`; what is not there is listed under `missing`."""
    found: dict[str, Any] = {}
    ratios: dict[str, Any] = {}
    predicted: dict[str, float] = {}
    missing: list[str] = []
    for cell in cells:
        result = cell_result(cell, kept)
        if result is None:
            missing.append(cell.name)
            continue
        found[cell.name] = result
        rounds, starts = kept.rounds(cell), kept.rounds(cell, "start")
        ratios |= named_ratios(cell.name, cell.arms, rounds, starts, on_cpu=on_cpu)
        expected = predicted_ratios(cell, sizes_of(worlds[cell.name]), on_cpu=on_cpu)
        predicted |= {name: value for name, value in expected.items() if name in ratios}
    return {
        "benchmark": "serving",
        **kept.origin,
        "short": short,
        "cells": found,
        "ratios": ratios,
        "predicted": predicted,
        "aims": [aim.judged(ratios) for aim in aims(on_cpu)],
        "missing": missing,
    }
