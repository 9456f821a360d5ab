"""Thresholds of "Does it work?": what passes, and the numbers and the advice of what does not."""

from __future__ import annotations

from typing import Any

import pytest

from safegene_vllm.recipe.checks import Check, calibration_checks, check_training, family_checks

GOOD: dict[str, Any] = {
    "train_rows": {"safety": 240, "benign": 240},
    "held_out_rows": {"safety": 60, "benign": 60},
    "open_prompts": 60,
    "refused": 58,
    "safety_rows": 58,
    "safety_loss": {"aligned": 0.1, "degraded": 0.8, "restored": 0.2},
    "benign_rows": 60,
    "benign_loss": {"aligned": 1.5, "degraded": 0.5, "restored": 0.55},
    "training_losses": [0.4] * 10 + [0.12] * 50,
    "captured": 0.55,
}
RECORD: dict[str, Any] = {
    "shots": {"safety": 16, "task": 16, "benign": 16},
    "before": {"safety": 0.8, "task": 0.0, "benign": 0.0},
    "after": {"safety": 0.2, "task": 0.0, "benign": 0.03},
}


def failed(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks if not check.passed}


def test_the_numbers_of_the_example_pass() -> None:
    assert failed(family_checks(GOOD)) == {}
    assert failed(calibration_checks(RECORD, [2.0] * 14 + [3.0], (0.0, 3.0))) == {}


@pytest.mark.parametrize(
    ("changes", "name", "measured", "advice"),
    [
        (
            {"safety_loss": {"aligned": 3.106, "degraded": 3.108, "restored": 3.0}},
            "degradation",
            "3.106 to 3.108 (+0.002) on 58 held-out",
            "did not degrade",
        ),
        (
            {"safety_loss": {"aligned": 0.1, "degraded": 0.8, "restored": 0.6}},
            "vector",
            "0.800 to 0.600 at coefficient 1 on 58 held-out harmful prompts, 29% of the rise",
            "--distill-steps",
        ),
        (
            {"benign_loss": {"degraded": 0.5, "restored": 0.9}},
            "benign responses",
            "0.500 to 0.900",
            "--benign",
        ),
        ({"training_losses": [0.3] * 60}, "distillation", "0.300 to 0.300 (-0%)", "nothing"),
        ({"train_rows": {"safety": 6, "benign": 240}}, "safety data", "6 rows to train", "80"),
        ({"held_out_rows": {"safety": 60, "benign": 2}}, "benign data", "2 held out", "64 and 8"),
        ({"refused": 3}, "aligned model", "refuses 3 of 60", "instruct model"),
        ({"safety_loss": None}, "degradation", "not measured", "--safety"),
        ({"captured": 0.2}, "captured energy", "20% of the vector", "--top-k"),
    ],
)
def test_a_family_that_does_not_work_is_reported(
    changes: dict[str, Any], name: str, measured: str, advice: str
) -> None:
    found = failed(family_checks({**GOOD, **changes}))
    assert measured in found[name].measured and advice in found[name].advice
    # A degradation that did not degrade leaves nothing to restore.
    assert set(found) == {name} or (name == "degradation" and set(found) <= {name, "vector"})


@pytest.mark.parametrize(
    ("changes", "coefficients", "name", "measured", "advice"),
    [
        (
            {"after": {"safety": 0.79, "task": 0.0, "benign": 0.0}},
            [2.0] * 4,
            "safety",
            "0.800 to 0.790 (-1%)",
            "did not fall",
        ),
        ({}, [3.0, 3.0, 1.0, 1.0], "coefficients", "2 of 4 at the upper bound 3", "--bounds"),
        ({}, [0.0] * 4, "coefficients", "all 4 are 0", "--initial"),
        (
            {"after": {"safety": 0.2, "task": 0.4, "benign": 0.0}},
            [2.0] * 4,
            "task responses",
            "0.400 nats",
            "--task-weight",
        ),
        ({"shots": {"safety": 4, "task": 16}}, [2.0] * 4, "examples", "4 safety", "--shots"),
        ({"after": {"safety": 0.2, "task": 0.0}}, [2.0], "benign responses", "not", "--benign"),
    ],
)
def test_a_calibration_that_does_not_work_is_reported(
    changes: dict[str, Any], coefficients: list[float], name: str, measured: str, advice: str
) -> None:
    found = failed(calibration_checks({**RECORD, **changes}, coefficients, (0.0, 3.0)))
    assert set(found) == {name}
    assert measured in found[name].measured and advice in found[name].advice


def test_a_tenant_that_is_safe_without_the_vector_passes() -> None:
    safe = {"before": {"safety": 0.05}, "after": {"safety": 0.05, "benign": 0.0}}
    assert "safety" not in failed(calibration_checks({**RECORD, **safe}, [1.0], (0.0, 3.0)))


def test_few_steps_are_judged_by_the_first_and_the_last() -> None:
    assert (
        check_training([1.0, 0.5], "x", "y").measured
        == "training loss 1.000 to 0.500 (-50%) in 2 steps"
    )
    assert not check_training([1.0], "x", "y").passed
