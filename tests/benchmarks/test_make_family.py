"""`make family` as a chain of stages: existing outputs stay, those after a new one are remade.

Stages are stand-ins here; the recipe has tests of its own.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.smollm2 import make_family

NAMES = ("parent", "parent-merged", "vector", "record")


class Chain:
    """Four stages that note what they were made from: the newest of the stage before."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.ran, self.broken = folder, list[str](), ""
        patch.setattr(make_family, "stages", lambda places: self.stages())
        self.places = make_family.Places(folder, folder, folder, folder)

    def stages(self) -> dict:
        return {name: (self.folder / name, lambda name=name: self.make(name)) for name in NAMES}

    def make(self, name: str) -> None:
        if name == self.broken:
            raise KeyboardInterrupt
        self.ran.append(name)
        output = self.folder / name
        if name.endswith("-merged"):
            output.mkdir(exist_ok=True)
        else:
            output.write_text(name)

    def run(self, *only: str, force: bool = False) -> list[str]:
        self.ran = []
        make_family.run(self.places, list(only), force)
        return self.ran


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chain:
    made = Chain(tmp_path, monkeypatch)
    assert made.run() == list(NAMES)
    return made


def test_what_is_there_stays_and_merging_looks_for_itself(chain: Chain) -> None:
    assert chain.run() == ["parent-merged"]


def test_stages_after_a_new_output_are_run_again(chain: Chain) -> None:
    (chain.folder / "vector").unlink()
    assert chain.run() == ["parent-merged", "vector", "record"]
    assert chain.run("vector", force=True) == ["vector"]


@pytest.mark.parametrize("force", [False, True])
def test_a_remake_that_is_cut_off_leaves_nothing_old_that_looks_done(
    chain: Chain, force: bool
) -> None:
    (chain.folder / "parent").unlink()
    chain.broken = "vector"
    with pytest.raises(KeyboardInterrupt):
        chain.run(force=force)
    assert chain.ran == ["parent", "parent-merged"]
    chain.broken = ""
    assert chain.run() == ["parent-merged", "vector", "record"]
