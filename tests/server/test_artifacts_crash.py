"""Several processes on one store, and processes killed at every step: nothing half is trusted."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
from artifact_files import FAMILY, a_profile, a_tenant, content, tree

from safegene_server.artifacts import Store

FORK = multiprocessing.get_context("fork")
STEPS = (
    *("mkdir", "open", "fsync", "fchmod", "chmod", "link", "rename", "replace", "unlink"),
    *("utime", "rmdir"),
)


def run(work: Callable[[], None]) -> Any:
    """Start `work` in a process of its own."""
    process = FORK.Process(target=work, daemon=True)
    process.start()
    return process


def die_before(nth: int) -> None:
    """Kill this process right before its nth call into the file system."""
    calls = [0]

    def deadly(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return step

    for name in STEPS:
        setattr(os, name, deadly(getattr(os, name)))


def killed_at_every_step(work: Callable[[], None], check: Callable[[], None]) -> int:
    """Number of steps of `work`; after a kill at each of them, `check` is called."""
    for nth in range(1, 400):

        def doomed(nth: int = nth) -> None:
            die_before(nth)
            work()

        process = run(doomed)
        process.join(30)
        if process.exitcode == 0:
            return nth - 1
        assert process.exitcode == -signal.SIGKILL
        check()
    raise AssertionError("it never ended")


def test_staging_killed_at_any_step_leaves_nothing_that_is_trusted(tmp_path: Path) -> None:
    tenant, profile, root = a_tenant(tmp_path / "acme"), a_profile(), tmp_path / "store"
    whole = Store(tmp_path / "whole")
    digest = whole.stage(tenant, family=FAMILY).digest
    expected = content(whole.revision(digest, profile))
    seen: set[tuple[str, ...]] = set()

    def onboard() -> None:
        store = Store(root)
        store.revision(store.stage(tenant, family=FAMILY).digest, profile)

    def check() -> None:
        store = Store(root)
        assert list((root / "incoming").iterdir()) == [], "swept at the next start"
        seen.add(tuple(tree(root)))
        for path in root.glob("adapters/*"):
            store.verify(f"sha256:{path.name}")
        for path in root.glob("revisions/*"):
            assert content(path) == expected
        store.remove_unused([], idle_s=-1.0)
        assert tree(root) == []

    assert killed_at_every_step(onboard, check) > 20
    assert len(seen) == 3, "nothing, then the adapter, then the revision: each whole"
    onboard()
    assert content(next(root.glob("revisions/*"))) == expected


def test_a_repair_killed_at_any_step_never_leaves_damage_trusted(tmp_path: Path) -> None:
    tenant, profile, root = a_tenant(tmp_path / "acme"), a_profile(), tmp_path / "store"
    store = Store(root)
    digest = store.stage(tenant, family=FAMILY).digest
    assert digest is not None
    path = store.revision(digest, profile)
    whole = content(path)

    def damage() -> None:
        file = path / "adapter_model.safetensors"
        file.unlink()
        file.write_bytes(b"damaged")

    def repair() -> None:
        Store(root).revision(digest, profile)

    def check() -> None:
        assert content(Store(root).revision(digest, profile)) == whole
        assert list((root / "incoming").iterdir()) == []
        damage()

    damage()
    assert killed_at_every_step(repair, check) > 10


def test_removal_killed_at_any_step_leaves_whole_directories(tmp_path: Path) -> None:
    tenant, root = a_tenant(tmp_path / "acme"), tmp_path / "store"
    store = Store(root)
    digest = store.stage(tenant, family=FAMILY).digest
    profiles = (a_profile(0.5), a_profile(1.0))
    retained = (digest, profiles[0].digest)

    def fill() -> None:
        store.stage(tenant, family=FAMILY)
        for profile in profiles:
            store.revision(digest, profile)

    def remove() -> None:
        Store(root).remove_unused([retained], idle_s=-1.0)

    def check() -> None:
        Store(root)
        store.verify(*retained)
        for path in root.glob("revisions/*"):
            store.verify(digest, f"sha256:{path.name.partition('-')[2]}")
        assert list((root / "incoming").iterdir()) == []
        fill()

    fill()
    assert killed_at_every_step(remove, check) > 10
    assert len(list(root.glob("revisions/*"))) == 1


@pytest.mark.parametrize("processes", [2, 4])
def test_one_revision_made_by_several_processes_at_once(tmp_path: Path, processes: int) -> None:
    tenant, root = a_tenant(tmp_path / "acme"), tmp_path / "store"
    start: Barrier = FORK.Barrier(processes)
    results: Any = FORK.Queue()

    def onboard() -> None:
        store = Store(root)
        for value in (0.25, 0.5, 0.75, 1.0):
            start.wait(30)
            digest = store.stage(tenant, family=FAMILY).digest
            start.wait(30)
            path = store.revision(digest, a_profile(value))
            store.verify(digest, a_profile(value).digest)
            results.put((digest, str(path), path.stat().st_ino))

    running = [run(onboard) for _ in range(processes)]
    found = {results.get(timeout=300) for _ in range(4 * processes)}
    for process in running:
        process.join(30)
        assert process.exitcode == 0
    assert len(found) == 4, "one directory per profile, made once"
    assert len(list(root.glob("adapters/*"))) == 1
    assert list((root / "incoming").iterdir()) == []


def test_a_sweep_spares_a_living_process_and_takes_a_dead_one(tmp_path: Path) -> None:
    root = tmp_path / "store"
    store = Store(root)

    def hold() -> None:
        from safegene_server.artifacts.layout import workspace

        with workspace(root) as work:
            (work / "file").write_bytes(b"x")
            time.sleep(60)

    process = run(hold)
    deadline_s = time.monotonic() + 300
    while not list(root.glob("incoming/*/file")):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    store.remove_unused([], idle_s=-1.0)
    Store(root)
    assert len(list(root.glob("incoming/*/file"))) == 1
    process.kill()
    process.join(30)
    Store(root)
    assert list(root.glob("incoming/*")) == []
