"""Damage that `verify` finds in a store, and its repair by staging again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from artifact_files import FAMILY, FILES, a_profile, a_tenant, content

from safegene_server.artifacts import Store
from safegene_vllm.errors import DigestError, MissingFileError, SafegeneError

WEIGHTS = "adapter_model.safetensors"


class World:
    """A store with one tenant staged and one revision made of it."""

    def __init__(self, root: Path) -> None:
        self.source = a_tenant(root / "acme")
        self.store = Store(root / "store")
        self.profile = a_profile()
        staged = self.store.stage(self.source, family=FAMILY)
        assert staged.digest is not None and staged.directory is not None
        self.digest, self.adapter = staged.digest, staged.directory
        self.revision = self.store.revision(self.digest, self.profile)

    def verify(self) -> None:
        self.store.verify(self.digest, self.profile.digest)

    def check_rejected(self, error: type[SafegeneError], says: str) -> None:
        with pytest.raises(error, match=says):
            self.verify()

    def repair(self) -> None:
        """Repair as the messages advise."""
        self.store.stage(self.source, family=FAMILY)
        self.store.revision(self.digest, self.profile)
        self.verify()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def overwrite(path: Path) -> None:
    """Flip the last byte in place, as a bad disk would: same file, same size, every link of it."""
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


def test_a_stored_revision_is_found_intact(world: World) -> None:
    world.verify()
    world.store.verify(world.digest)
    world.store.revision(None, world.profile)
    world.store.verify(None, world.profile.digest)
    with pytest.raises(ValueError, match="name an adapter"):
        world.store.verify(None)


@pytest.mark.parametrize("name", FILES)
def test_an_altered_file_is_found_and_repaired(world: World, name: str) -> None:
    before = content(world.revision)
    overwrite(world.adapter / name)
    world.check_rejected(DigestError, "2 errors:(.|\n)*altered on this disk.*stage")
    world.repair()
    assert content(world.revision) == before
    assert os.path.samefile(world.revision / WEIGHTS, world.adapter / WEIGHTS)
    assert list((world.store.root / "incoming").iterdir()) == []


def test_a_revision_with_a_replaced_file_is_repaired_at_the_next_call(
    world: World,
) -> None:
    before = content(world.revision)
    (world.revision / WEIGHTS).unlink()
    (world.revision / WEIGHTS).write_bytes(b"x" * len(before[WEIGHTS]))
    world.check_rejected(DigestError, "revisions.*has digest")
    world.store.verify(world.digest)
    assert world.store.revision(world.digest, world.profile) == world.revision
    assert content(world.revision) == before
    world.verify()


@pytest.mark.parametrize(
    "twist",
    [
        lambda d: (d / "safegene.json").unlink(),
        lambda d: (d / "adapter_config.json").unlink(),
        lambda d: (d / "extra").write_text("x"),
        lambda d: shutil.rmtree(d),
    ],
)
def test_an_incomplete_or_crowded_revision_is_never_handed_out(world: World, twist: object) -> None:
    before = content(world.revision)
    twist(world.revision)  # type: ignore[operator]
    with pytest.raises((DigestError, MissingFileError), match="revisions"):
        world.verify()
    assert world.store.revision(world.digest, world.profile) == world.revision
    assert content(world.revision) == before


def test_another_profile_in_a_revision_s_place_is_found(world: World) -> None:
    other = world.store.revision(world.digest, a_profile(2.0))
    path = world.revision / "safegene.json"
    path.unlink()
    shutil.copy(other / "safegene.json", path)
    world.check_rejected(DigestError, f"holds profile {a_profile(2.0).digest}")
    world.store.revision(world.digest, world.profile)
    world.verify()


def test_a_removed_adapter_is_reported_and_staged_again(world: World) -> None:
    shutil.rmtree(world.adapter)
    world.check_rejected(MissingFileError, "adapters.*stage the source again")
    assert world.store.revision(world.digest, world.profile) == world.revision, "still whole"
    with pytest.raises(MissingFileError, match="stage its source again"):
        world.store.revision(world.digest, a_profile(2.0))
    world.repair()
