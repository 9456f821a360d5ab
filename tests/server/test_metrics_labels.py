"""Tenant labels: bounded, stable, first come, first served; and the settings that bound them."""

from __future__ import annotations

import pytest

from safegene_server.metrics.labels import NO_TENANT, OTHER, TenantLabels
from safegene_server.metrics.settings import MetricsSettings
from safegene_vllm.errors import ConfigError


def test_the_first_tenants_have_labels_and_the_rest_share_one() -> None:
    labels = TenantLabels(MetricsSettings(max_tenants=2))
    assert [labels.label(name) for name in ("a", "b", "c", "a", "d", "b")] == [
        "a",
        "b",
        OTHER,
        "a",
        OTHER,
        "b",
    ]
    assert [labels.has_own(name) for name in ("a", "b", "c")] == [True, True, False]


def test_tenants_of_the_settings_have_labels_from_the_start() -> None:
    labels = TenantLabels(MetricsSettings(max_tenants=2, tenants=("vip",)))
    assert [labels.label(name) for name in ("a", "b", "vip")] == ["a", OTHER, "vip"]


def test_no_tenant_uses_no_label() -> None:
    labels = TenantLabels(MetricsSettings(max_tenants=1))
    assert labels.label(NO_TENANT) == ""
    assert not labels.has_own(NO_TENANT)
    assert labels.label("a") == "a"


def test_a_tenant_that_is_called_other_is_one_of_the_rest() -> None:
    labels = TenantLabels(MetricsSettings(max_tenants=1, tenants=("other",)))
    assert labels.label("other") == OTHER
    assert not labels.has_own("other")
    assert labels.label("a") == "a"


def test_no_places_at_all() -> None:
    labels = TenantLabels(MetricsSettings(max_tenants=0))
    assert labels.label("a") == OTHER
    assert not labels.has_own("a")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_tenants": -1}, "metrics.max_tenants = -1, expected 0 or more"),
        ({"max_tenants": 1, "tenants": ("a", "b")}, "names 2 tenants, expected at most"),
        ({"period_s": 0.5}, "metrics.period_s = 0.5, expected 1 or more"),
        ({"period_s": float("nan")}, "metrics.period_s = nan, expected 1 or more"),
    ],
)
def test_bad_settings_are_named(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MetricsSettings(**given)  # type: ignore[arg-type]
