"""Settings of tenants: invalid values are rejected when they are set."""

from __future__ import annotations

import pytest

from safegene_server.tenants import CalibrationSettings, GateSettings, TenantSettings
from safegene_vllm.errors import ConfigError


def test_the_defaults_are_allowed() -> None:
    assert TenantSettings().gate == GateSettings()
    assert TenantSettings().gate.enabled


def test_every_bad_threshold_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        GateSettings(harmful_min_refused=1.5, coherent_min=-0.1, concurrent=0)
    for word in ("harmful_min_refused = 1.5", "coherent_min = -0.1", "gate.concurrent = 0"):
        assert word in str(caught.value)
    with pytest.raises(ConfigError, match="lookalike_max_refused"):
        GateSettings(lookalike_max_refused=float("nan"))


def test_bad_numbers_of_jobs() -> None:
    with pytest.raises(ConfigError, match="jobs_at_once = 0, expected more than 0"):
        TenantSettings(jobs_at_once=0)


def test_every_bad_number_of_calibration_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        CalibrationSettings(
            evaluations=0, timeout_s=0.0, share=1.5, held_out=0.0, pull=-1.0, refusal=" "
        )
    for word in (
        "calibration.evaluations = 0",
        "calibration.timeout_s = 0.0",
        "calibration.share = 1.5, expected more than 0, at most 1",
        "calibration.held_out = 0.0",
        "calibration.pull = -1.0",
        "calibration.refusal is empty",
    ):
        assert word in str(caught.value)
    with pytest.raises(ConfigError, match="share"):
        CalibrationSettings(share=float("nan"))
