"""Names, locks, private directories and the rename that makes them public."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import pytest

from safegene_server.artifacts import layout
from safegene_vllm.errors import DigestError, StoreError

A, B = "sha256:" + 64 * "a", "sha256:" + 64 * "b"


def test_names_are_made_of_digests_and_of_nothing_else() -> None:
    assert layout.revision_name(A, B) == f"{64 * 'a'}-{64 * 'b'}"
    assert layout.revision_name(None, B) == f"none-{64 * 'b'}"
    for bad in ("", "none", "sha256:../../etc", 64 * "a", "sha256:" + 64 * "A", A + "/.."):
        with pytest.raises(DigestError, match="64 hex digits"):
            layout.revision_name(bad, B)
        with pytest.raises(DigestError, match="64 hex digits"):
            layout.revision_name(None, bad)


def test_an_adapter_s_digest_is_over_names_and_hashes() -> None:
    digest = layout.adapter_digest_of({"a": "1", "b": "2"})
    assert layout.adapter_digest_of({"b": "2", "a": "1"}) == digest
    assert layout.adapter_digest_of({"a": "2", "b": "1"}) != digest
    layout.hexadecimal(digest)


def test_a_store_is_for_its_user_alone(tmp_path: Path) -> None:
    layout.make_root(tmp_path / "deep" / "store")
    assert (tmp_path / "deep" / "store").stat().st_mode & 0o077 == 0


def test_a_root_that_cannot_be_made_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"file.*check the disk"):
        layout.make_root(tmp_path / "file" / "store")


def test_a_full_disk_is_called_full(tmp_path: Path) -> None:
    with (
        pytest.raises(StoreError, match=r"No space left.*free some space"),
        layout.store_errors(tmp_path),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def held_by_another(root: Path, *, shared: bool) -> bool:
    """True if another process has to wait while we hold the lock exclusively or shared."""
    got = threading.Event()

    def other() -> None:
        with layout.locked(root, shared=True):
            got.set()

    thread = threading.Thread(target=other)
    with layout.locked(root, shared=shared):
        thread.start()
        waits = not got.wait(20 if shared else 0.3)
    thread.join(10)
    assert got.is_set()
    return waits


def test_the_lock_is_one_or_shared(tmp_path: Path) -> None:
    layout.make_root(tmp_path)
    assert held_by_another(tmp_path, shared=False)
    assert not held_by_another(tmp_path, shared=True)


def test_a_fork_that_lives_on_does_not_hold_the_lock(tmp_path: Path) -> None:
    layout.make_root(tmp_path)
    with layout.locked(tmp_path):
        pid = os.fork()
        if pid == 0:
            time.sleep(30)
            os._exit(0)
    try:
        assert not held_by_another(tmp_path, shared=True)
        with layout.locked(tmp_path):
            pass
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def test_a_sweep_takes_the_directories_of_the_dead_alone(tmp_path: Path) -> None:
    layout.make_root(tmp_path)
    dead = tmp_path / "incoming" / "dead"
    dead.mkdir()
    (dead / "half").write_bytes(b"x")
    (tmp_path / "incoming" / "stranger").write_bytes(b"x")
    with layout.workspace(tmp_path) as work:
        (work / "mine").write_bytes(b"x")
        layout.sweep(tmp_path)
        assert not dead.exists()
        assert (work / "mine").exists()
    assert [path.name for path in (tmp_path / "incoming").iterdir()] == ["stranger"]


def test_an_installed_directory_is_whole_and_takes_the_place_of_another(tmp_path: Path) -> None:
    target, aside = tmp_path / "target", tmp_path / "aside"
    for text in ("one", "two"):
        fresh = tmp_path / "fresh"
        fresh.mkdir()
        (fresh / "file").write_text(text)
        layout.install(fresh, target, aside)
        assert (target / "file").read_text() == text
    assert (aside / "file").read_text() == "one"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["aside", "target"]


@pytest.mark.parametrize("number", [errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP])
def test_where_there_are_no_more_links_a_copy_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def reject(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"content")
    monkeypatch.setattr(os, "link", reject)
    layout.link(source, target)
    assert target.read_bytes() == b"content"
    assert target.stat().st_mode & 0o777 == 0o444
    assert not os.path.samefile(source, target)


def test_other_failures_of_a_link_are_failures(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        layout.link(tmp_path / "missing", tmp_path / "target")
