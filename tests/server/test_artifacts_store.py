"""The store by its verbs: stage, revision, drop, remove_unused; and what is left when one fails."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest
from artifact_files import FAMILY, FILES, a_profile, a_tenant, content, tree
from format_files import saved_family

from safegene_server.artifacts import Limits, SourceRules, Staged, Store
from safegene_vllm.errors import (
    AdapterRejectedError,
    DigestError,
    MissingFileError,
    NonFiniteError,
    SafegeneError,
    SourceError,
    StoreError,
)
from safegene_vllm.formats.adapter import load_adapter
from safegene_vllm.formats.profile import load_profile, save_profile
from safegene_vllm.formats.safetensors_file import read_tensors, serialize


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", rules=SourceRules(protocols=("memory",)))


def hexadecimal(digest: str | None) -> str:
    return (digest or "").removeprefix("sha256:")


def test_an_adapter_is_staged_by_content(tmp_path: Path, store: Store) -> None:
    tenant = a_tenant(tmp_path / "acme", profile=1.5)
    staged = store.stage(tenant, family=FAMILY)
    directory = store.root / "adapters" / hexadecimal(staged.digest)
    size = sum(len(data) for data in content(tenant).values())
    assert staged == Staged(staged.digest, directory, "adapter", size, a_profile(1.5))
    assert content(directory) == {name: (tenant / name).read_bytes() for name in FILES}
    assert {path.stat().st_mode & 0o222 for path in directory.iterdir()} == {0}
    assert list((store.root / "incoming").iterdir()) == []


def test_equal_content_of_any_source_is_one_adapter(tmp_path: Path, store: Store) -> None:
    first = store.stage(a_tenant(tmp_path / "acme"), family=FAMILY)
    before = tree(store.root)
    fsspec.filesystem("memory").put(str(tmp_path / "acme"), f"/b{tmp_path}", recursive=True)
    again = store.stage(f"memory://b{tmp_path}", family=FAMILY)
    assert (again.digest, again.directory) == (first.digest, first.directory)
    assert tree(store.root) == before
    other = store.stage(a_tenant(tmp_path / "other", start=3), family=FAMILY)
    assert other.digest != first.digest


def test_a_bare_profile_is_a_tenant_without_an_adapter(tmp_path: Path, store: Store) -> None:
    save_profile(a_profile(0.5), tmp_path / "bare")
    staged = store.stage(tmp_path / "bare", family=FAMILY)
    size = (tmp_path / "bare" / "safegene.json").stat().st_size
    assert staged == Staged(None, None, "profile", size, a_profile(0.5))
    assert tree(store.root) == []


def test_fetching_again_takes_nothing_else_than_was_registered(
    tmp_path: Path, store: Store
) -> None:
    tenant = a_tenant(tmp_path / "acme", profile=1.0)
    staged = store.stage(tenant, family=FAMILY)
    replica = Store(tmp_path / "replica")
    (tenant / "safegene.json").write_text("the registry has the profile by now")
    again = replica.stage(tenant, family=FAMILY, expected=staged.digest)
    assert (again.digest, again.profile) == (staged.digest, None)
    a_tenant(tenant, start=5)
    fresh = Store(tmp_path / "fresh")
    with pytest.raises(DigestError, match=f"acme has digest sha256.*expected {staged.digest}"):
        fresh.stage(tenant, family=FAMILY, expected=staged.digest)
    assert tree(fresh.root) == []


def test_a_source_that_does_not_pass_leaves_nothing(tmp_path: Path, store: Store) -> None:
    bad = a_tenant(tmp_path / "bad")
    tensors = read_tensors(bad / FILES[1])
    next(iter(tensors.values()))[0, 0] = float("nan")
    (bad / FILES[1]).write_bytes(serialize(tensors))
    (tmp_path / "empty").mkdir()
    for source, error in (
        (bad, NonFiniteError),
        (tmp_path / "empty", MissingFileError),
        (tmp_path / "missing", MissingFileError),
        ("memory://nothing/here", MissingFileError),
        ("s3://not/allowed", SourceError),
    ):
        with pytest.raises(error, match=str(source)):
            store.stage(source, family=FAMILY)
        assert tree(store.root) == []


def test_roots_and_limits_are_those_of_the_store(tmp_path: Path) -> None:
    tenant = a_tenant(tmp_path / "acme")
    rooted = Store(tmp_path / "store", rules=SourceRules(roots=(tmp_path / "elsewhere",)))
    with pytest.raises(AdapterRejectedError, match="elsewhere"):
        rooted.stage(tenant, family=FAMILY)
    small = Store(tmp_path / "store", limits=Limits(weights_bytes=10))
    with pytest.raises(SourceError, match="allowed are 10"):
        small.stage(tenant, family=FAMILY)
    assert tree(small.root) == []


@pytest.mark.parametrize("nth", range(8))
def test_a_disk_that_fills_up_leaves_nothing_and_says_so(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    tenant, profile = a_tenant(tmp_path / "acme"), a_profile()
    calls, real = [0], os.fsync

    def full(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == nth + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match=r"No space left.*free some space"):
            store.revision(store.stage(tenant, family=FAMILY).digest, profile)
    assert list((store.root / "incoming").iterdir()) == []
    digest = store.stage(tenant, family=FAMILY).digest
    store.revision(digest, profile)
    store.verify(digest, profile.digest)


def test_a_revision_is_the_adapter_s_files_and_one_profile(tmp_path: Path, store: Store) -> None:
    tenant = a_tenant(tmp_path / "acme", profile=3.0)
    staged = store.stage(tenant, family=FAMILY)
    assert staged.directory is not None
    path = store.revision(staged.digest, a_profile(0.5))
    name = f"{hexadecimal(staged.digest)}-{hexadecimal(a_profile(0.5).digest)}"
    assert path == store.root / "revisions" / name
    assert load_profile(path) == a_profile(0.5)
    assert set(load_adapter(path).lora_weights) == set(load_adapter(tenant).lora_weights)
    for file in FILES:
        assert os.path.samefile(path / file, staged.directory / file)
    assert {p.stat().st_mode & 0o222 for p in path.iterdir()} == {0}
    inode = path.stat().st_ino
    assert store.revision(staged.digest, a_profile(0.5)) == path
    assert path.stat().st_ino == inode, "not made again"
    assert store.revision(staged.digest, a_profile(0.6)) != path


def test_a_revision_of_the_base_is_a_profile_alone(store: Store) -> None:
    path = store.revision(None, a_profile())
    assert path.name == f"none-{hexadecimal(a_profile().digest)}"
    assert [p.name for p in path.iterdir()] == ["safegene.json"]
    assert store.revision(None, a_profile()) == path


def test_a_revision_needs_a_staged_adapter_and_a_digest(store: Store) -> None:
    for digest, error in (("sha256:" + 64 * "0", MissingFileError), ("../../x", DigestError)):
        with pytest.raises(error, match=digest):
            store.revision(digest, a_profile())
    assert tree(store.root) == []


def test_without_hard_links_a_revision_is_a_copy(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reject(*_: object) -> None:
        raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))

    monkeypatch.setattr(os, "link", reject)
    digest = store.stage(a_tenant(tmp_path / "acme"), family=FAMILY).digest
    path = store.revision(digest, a_profile())
    store.verify(digest, a_profile().digest)
    inode = path.stat().st_ino
    assert store.revision(digest, a_profile()).stat().st_ino == inode, "read, and found whole"


def age(store: Store, *paths: Path | None, s: float = 7200.0) -> None:
    for path in paths or [*store.root.glob("adapters/*"), *store.root.glob("revisions/*")]:
        assert path is not None
        os.utime(path, (time.time() - s, time.time() - s))


def test_unused_directories_are_removed(tmp_path: Path, store: Store) -> None:
    first, second = (
        store.stage(a_tenant(tmp_path / f"{start}", start=start), family=FAMILY).digest
        for start in (1, 3)
    )
    old, retained = a_profile(1.0), a_profile(2.0)
    for adapter, profile in (
        (first, old),
        (first, retained),
        (second, old),
        (None, old),
        (None, retained),
    ):
        store.revision(adapter, profile)
    age(store)
    removed = store.remove_unused([(first, retained.digest), (None, retained.digest)])
    one, two = hexadecimal(first), hexadecimal(second)
    o, k = hexadecimal(old.digest), hexadecimal(retained.digest)
    expected = [f"revisions/{a}-{o}" for a in (one, two, "none")] + [f"adapters/{two}"]
    assert sorted(removed) == sorted(expected)
    assert {p.parent.name + "/" + p.name for p in store.root.glob("[ar]*/*")} == {
        *(f"adapters/{one}", f"revisions/{one}-{k}", f"revisions/none-{k}")
    }
    store.verify(first, retained.digest)
    assert list((store.root / "incoming").iterdir()) == []
    assert store.remove_unused([(first, retained.digest), (None, retained.digest)]) == ()


def test_one_revision_is_dropped_and_its_adapter_stays(tmp_path: Path, store: Store) -> None:
    digest = store.stage(a_tenant(tmp_path / "acme"), family=FAMILY).digest
    dropped, retained = a_profile(1.0), a_profile(2.0)
    path = store.revision(digest, dropped)
    store.revision(digest, retained)
    store.drop(digest, dropped.digest)
    assert not path.exists() and list((store.root / "incoming").iterdir()) == []
    store.drop(digest, dropped.digest)
    store.verify(digest, retained.digest)
    assert store.revision(digest, dropped) == path


def test_what_was_used_lately_stays_with_its_adapter(tmp_path: Path, store: Store) -> None:
    tenant = a_tenant(tmp_path / "acme")
    digest = store.stage(tenant, family=FAMILY).digest
    path = store.revision(digest, a_profile())
    assert store.remove_unused([]) == ()
    age(store)
    assert store.revision(digest, a_profile()) == path
    assert store.remove_unused([]) == (), "requested again, so in use"
    age(store)
    store.revision(digest, a_profile(2.0))
    assert store.remove_unused([]) == (f"revisions/{path.name}",), "a new one retains its adapter"
    path = store.revision(digest, a_profile(2.0))
    age(store)
    store.stage(tenant, family=FAMILY)
    assert store.remove_unused([]) == (f"revisions/{path.name}",), "the adapter was just staged"
    assert store.remove_unused([], idle_s=0.0) == (f"adapters/{hexadecimal(digest)}",)


def test_removal_leaves_strangers_and_takes_no_nonsense(store: Store) -> None:
    (store.root / "revisions" / "notes").mkdir()
    age(store)
    assert store.remove_unused([], idle_s=0.0) == ()
    with pytest.raises(DigestError, match="64 hex digits"):
        store.remove_unused([(None, "../..")])
    assert (store.root / "revisions" / "notes").is_dir()


def test_many_threads_on_one_store(tmp_path: Path, store: Store) -> None:
    tenants = [a_tenant(tmp_path / f"{n}", start=n) for n in (1, 3)]
    stop, problems = threading.Event(), list[SafegeneError]()

    def onboard(n: int) -> None:
        try:
            for value in (0.5, 1.0, 1.5):
                digest = store.stage(tenants[n % 2], family=FAMILY).digest
                store.revision(digest, a_profile(value))
                store.verify(digest, a_profile(value).digest)
        except SafegeneError as error:
            problems.append(error)

    def clean() -> None:
        while not stop.is_set():
            store.remove_unused([])
            Store(store.root)

    threads: list[Any] = [threading.Thread(target=onboard, args=(n,)) for n in range(6)]
    cleaner = threading.Thread(target=clean)
    for thread in (*threads, cleaner):
        thread.start()
    for thread in threads:
        thread.join(30)
    stop.set()
    cleaner.join(30)
    assert problems == []
    assert len(list((store.root / "revisions").iterdir())) == 6
    assert list((store.root / "incoming").iterdir()) == []


def test_none_of_this_loads_torch(tmp_path: Path) -> None:
    saved_family(tmp_path / "family")
    a_tenant(tmp_path / "acme", profile=1.0)
    code = """
import sys
from pathlib import Path
from safegene_server.artifacts import Store
from safegene_vllm.formats.family import read_family_header
root = Path(sys.argv[1])
store = Store(root / "store")
staged = store.stage(root / "acme", family=read_family_header(root / "family"))
store.revision(staged.digest, staged.profile)
store.verify(staged.digest, staged.profile.digest)
print(staged.digest, sorted({"torch", "vllm", "transformers"} & set(sys.modules)))
"""
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    digest = Store(tmp_path / "other").stage(tmp_path / "acme", family=FAMILY).digest
    assert done.stdout.strip() == f"{digest} []"
