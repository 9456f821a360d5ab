"""Tenants of a folder: found by name, registered once, and never in each other's way."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tenant_setup import World, world  # noqa: F401

from safegene_server.tenants import register_declared
from safegene_server.tenants.declared import find_declared
from safegene_vllm.errors import ConfigError, RegistryDownError


def test_every_folder_with_an_adapter_or_a_profile_is_found(tmp_path: Path) -> None:
    for name, file in (
        ("support", "adapter_config.json"),
        ("acme/chat", "safegene.json"),
        ("acme/deep/down", "safegene.json"),
        ("notes", "README.md"),
    ):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / file).touch()
    (tmp_path / "safegene.json").touch()
    found = {name: tmp_path / name for name in ("support", "acme/chat")}
    assert find_declared(tmp_path) == found
    with pytest.raises(ConfigError, match=r"tenants\.directory .* is no directory"):
        find_declared(tmp_path / "nothing")


def test_what_is_new_is_registered_and_what_is_known_is_left_alone(
    world: World,  # noqa: F811
    tmp_path: Path,
) -> None:
    for name in ("acme/support", "globex", "Not A Name"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "safegene.json").touch()

    def begin() -> list[str]:
        return asyncio.run(register_declared(world.tenancy, tmp_path))

    assert begin() == ["acme/support", "globex"], "a bad name hurts no other"
    jobs = world.registry.jobs.list(tenant="globex")
    assert [(job.kind, job.params["source"]) for job in jobs] == [
        ("onboard", str(tmp_path / "globex"))
    ]
    assert begin() == []
    world.registry.rollouts.retire("globex", actor="test")
    assert begin() == [], "a retired tenant is not registered again"
    assert len(world.registry.jobs.list(tenant="globex")) == 1


def test_a_registry_that_is_away_stops_the_start(
    world: World,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "acme").mkdir()
    (tmp_path / "acme" / "safegene.json").touch()

    def away(*args: object, **kwargs: object) -> None:
        raise RegistryDownError("away")

    monkeypatch.setattr(world.registry.tenants, "add", away)
    with pytest.raises(RegistryDownError):
        asyncio.run(register_declared(world.tenancy, tmp_path))
