"""Profiles from a requested change: four forms, one at a time, with a record."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from artifact_files import FAMILY, a_profile
from hypothesis import given
from hypothesis import strategies as st

from safegene_server.registry import Revision
from safegene_server.tenants import Change
from safegene_server.tenants.profiles import changed_profile, first_profile
from safegene_vllm.errors import BoundsError, DigestError, FamilyMismatchError, HeaderError
from safegene_vllm.formats.profile import make_profile, profile_json

LOW, HIGH = FAMILY.bounds
CURRENT = Revision(
    id=7,
    tenant="acme",
    number=3,
    kind="adapter",
    adapter_digest="sha256:" + "ad" * 32,
    profile=make_profile(FAMILY, {0: 1.0, 2: 0.5}, {"method": "test"}),
    source="/adapters/acme",
    state="published",
    reasons=(),
    gate={},
    created_at=datetime(2026, 1, 1, tzinfo=UTC),
    created_by="me",
)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (Change(coefficients=2.0), (2.0, 0.0, 2.0)),
        (Change(coefficients=[0.5, 0.0, 1.5]), (0.5, 0.0, 1.5)),
        (Change(layers={2: 1.5}), (1.0, 0.0, 1.5)),
        (Change(scale=2.0), (2.0, 0.0, 1.0)),
        (Change(scale=0.0), (0.0, 0.0, 0.0)),
    ],
)
def test_the_forms_of_a_change(change: Change, expected: tuple[float, ...]) -> None:
    made = changed_profile(FAMILY, CURRENT, change)
    assert made.coefficients == expected
    record = made.calibration["made_from"]
    assert record["revision"] == "acme@3" and record["profile"] == CURRENT.profile.digest
    assert record[change.form] is not None


def test_a_whole_profile_is_taken_as_it_is() -> None:
    whole = a_profile(2.0)
    change = Change(profile=profile_json(whole))
    assert changed_profile(FAMILY, CURRENT, change) == whole
    assert first_profile(FAMILY, change) == whole
    altered = {**profile_json(whole), "coefficients": [1.0, 0.0, 1.0]}
    with pytest.raises(DigestError, match="altered"):
        changed_profile(FAMILY, CURRENT, Change(profile=altered))
    foreign = replace(whole, family="sha256:" + "0" * 64)
    with pytest.raises(FamilyMismatchError):
        first_profile(FAMILY, Change(profile=profile_json(foreign)))
    with pytest.raises(HeaderError):
        first_profile(FAMILY, Change(profile={}))


@pytest.mark.parametrize(
    "change",
    [
        Change(scale=1.0),
        Change(layers={}),
        Change(layers={2: 0.5}),
        Change(coefficients=[1.0, -0.0, 0.5]),
        Change(profile=profile_json(CURRENT.profile)),
    ],
)
def test_a_change_that_changes_nothing_is_the_profile_itself(change: Change) -> None:
    assert changed_profile(FAMILY, CURRENT, change) is CURRENT.profile


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (Change(), "no change is given"),
        (Change(scale=1.0, layers={0: 1.0}), "layers and scale"),
        (Change(coefficients=[1.0]), "1 coefficients, expected 3"),
        (Change(coefficients=HIGH + 1), "expected"),
        (Change(layers={1: 1.0}), "no vector"),
        (Change(layers={9: 1.0}), "outside"),
        (Change(scale=1e308), "expected"),
        (Change(scale=float("nan")), "finite"),
        (Change(scale=float("inf")), "finite"),
    ],
)
def test_changes_that_cannot_be(change: Change, why: str) -> None:
    with pytest.raises(BoundsError, match=why):
        changed_profile(FAMILY, CURRENT, change)


def test_what_a_tenant_begins_with() -> None:
    assert first_profile(FAMILY, Change()) is None
    made = first_profile(FAMILY, Change(layers={2: 1.5}))
    assert made is not None and made.coefficients == (0.0, 0.0, 1.5)
    made = first_profile(FAMILY, Change(coefficients=1.0))
    assert made is not None and made.calibration == {"method": "given", "as": "coefficients"}
    with pytest.raises(BoundsError, match="scale is for a tenant that is served"):
        first_profile(FAMILY, Change(scale=2.0))


@given(st.floats(0.0, 2.0), st.floats(0.0, 2.0))
def test_scales_multiply(first: float, second: float) -> None:
    def scaled(current: Revision, by: float) -> Any:
        return replace(current, profile=changed_profile(FAMILY, current, Change(scale=by)))

    base = replace(CURRENT, profile=make_profile(FAMILY, 0.5))
    twice = scaled(scaled(base, first), second)
    product = 0.5 * first * second
    assert twice.profile.coefficients == pytest.approx((product, 0.0, product))


@pytest.mark.parametrize(
    ("calibration", "why"),
    [
        (lambda: nested(70), "deeper than 64"),
        (lambda: {"x": [nested(70)]}, "deeper than 64"),
        (lambda: {"x": "y" * (1 << 20)}, "bytes of JSON"),
    ],
)
def test_oversized_records_are_rejected(calibration: Any, why: str) -> None:
    """They would be read by every server at every change."""
    big = make_profile(FAMILY, 1.0, calibration())
    with pytest.raises(HeaderError, match=why):
        first_profile(FAMILY, Change(profile=profile_json(big)))
    with pytest.raises(HeaderError, match=why):
        changed_profile(FAMILY, CURRENT, Change(profile=profile_json(big)))
    fine = make_profile(FAMILY, 1.0, nested(50))
    assert first_profile(FAMILY, Change(profile=profile_json(fine))) == fine


def nested(depth: int) -> dict[str, Any]:
    made: dict[str, Any] = {"end": 1}
    for _ in range(depth):
        made = {"a": made}
    return made
