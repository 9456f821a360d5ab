"""Targets: the sources of their coefficients, and tenants that cannot be one."""

from __future__ import annotations

from pathlib import Path

import pytest

from safegene_vllm.errors import AdapterRejectedError, BoundsError, ConfigError, FamilyMismatchError
from safegene_vllm.evaluation.targets import (
    Target,
    adapter_of,
    before_and_after,
    check_targets,
    checkpoint_of,
    profile_of,
)
from safegene_vllm.formats.family import FamilyHeader, read_family_header
from safegene_vllm.formats.profile import load_profile, make_profile, save_profile
from safegene_vllm.tiny_model import make_model, write_family, write_tenant


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("subjects")
    model = make_model("llama", root / "model")
    family = write_family(model, root / "family")
    write_tenant(model, root / "acme", family, [0.5, 1.0])
    write_tenant(model, root / "bare", family, [0.25, 0.0], adapter=False)
    write_tenant(model, root / "plain", None, None)
    write_family(model, root / "other", seed=8)
    return root


@pytest.fixture(scope="module")
def header(root: Path) -> FamilyHeader:
    return read_family_header(root / "family")


def test_before_is_zero_and_after_is_the_profile(root: Path, header: FamilyHeader) -> None:
    before, after = before_and_after("acme", root / "acme", header)
    assert (before.key, after.key) == ("acme/before", "acme/after")
    zero, full = profile_of(before, header), profile_of(after, header)
    assert zero is not None and zero.coefficients == (0.0, 0.0)
    assert full == load_profile(root / "acme") and after.profile == full.digest


def test_coefficients_take_the_place_of_the_profile(root: Path, header: FamilyHeader) -> None:
    for directory in (root / "acme", root / "plain", None):
        found = profile_of(Target("a", "scaled", directory, (0.75, 0.25)), header)
        assert found is not None and found.coefficients == (0.75, 0.25)
    assert profile_of(Target("a", "b", root / "plain"), header) is None
    assert profile_of(Target("m", "parent"), None) is None


def test_what_a_directory_is(root: Path) -> None:
    for name, adapter, checkpoint in (
        ("acme", True, False),
        ("bare", False, False),
        ("model", False, True),
    ):
        target = Target("x", "y", root / name)
        assert (adapter_of(target) is not None, checkpoint_of(target) is not None) == (
            adapter,
            checkpoint,
        )


def test_a_profile_that_changed_is_noticed(
    root: Path, header: FamilyHeader, tmp_path: Path
) -> None:
    save_profile(load_profile(root / "acme"), tmp_path)
    after = before_and_after("acme", tmp_path, header)[1]
    save_profile(make_profile(header, [0.5, 1.1]), tmp_path)
    with pytest.raises(FamilyMismatchError, match="changed while the evaluation ran"):
        profile_of(after, header)


def test_tenants_that_cannot_be_evaluated(root: Path, header: FamilyHeader) -> None:
    other = read_family_header(root / "other")
    with pytest.raises(ConfigError, match=r"'plain'.*no profile.*safegene calibrate"):
        before_and_after("plain", root / "plain", header)
    with pytest.raises(FamilyMismatchError, match="the profile is for family"):
        before_and_after("acme", root / "acme", other)
    with pytest.raises(AdapterRejectedError, match="is a family"):
        before_and_after("family", root / "family", header)


def test_errors_of_all_targets_are_reported_together(root: Path, header: FamilyHeader) -> None:
    subjects = [
        Target("a", "x"),
        Target("a", "x"),
        Target("b", "y", None, (9.0, 0.0)),
        Target("c", "z", None, (1.0,)),
    ]
    with pytest.raises(ConfigError) as caught:
        check_targets(subjects, header)
    message = str(caught.value)
    assert "a/x is named twice" in message and "b/y: layer 0 has coefficient 9.0" in message
    assert "c/z: 1 coefficients" in message
    with pytest.raises(BoundsError, match="layer 0"):
        check_targets(subjects[2:3], header)
    with pytest.raises(ConfigError, match="b/y: b/y has coefficients, but no family"):
        check_targets(subjects[2:3], None)
    with pytest.raises(ConfigError, match="has a profile, but no family"):
        check_targets([Target("acme", "after", root / "acme")], None)
