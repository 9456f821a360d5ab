"""Kinds of tenant directories, by every entry of a server with a registry: layouts × entries.

Sources are decided where they lie, local or remote: the store's copy has the known files alone.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from artifact_files import FAMILY, a_profile, a_tenant, tree
from tenant_layouts import LAYOUTS, check_words, make
from tenant_setup import World, world  # noqa: F401
from test_artifacts_source import directory, web  # noqa: F401

from safegene_server.artifacts import SourceRules, Store
from safegene_server.artifacts.source import RemoteSource
from safegene_server.tenants import register_declared
from safegene_vllm.errors import (
    AdapterRejectedError,
    MissingFileError,
    PickleRejectedError,
    SafegeneError,
    SourceError,
)
from safegene_vllm.formats import tenant_kind as kinds
from safegene_vllm.formats.profile import save_profile

REJECTED = (AdapterRejectedError, MissingFileError, PickleRejectedError)
REMOTE = [name for name, layout in LAYOUTS.items() if not layout.local]


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """An adapter `a` without a profile, and a profile `p`."""
    a_tenant(tmp_path / "parts" / "a")
    save_profile(a_profile(0.5), tmp_path / "parts" / "p")
    return tmp_path / "parts"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", rules=SourceRules(protocols=("memory", "http")))


def remote(place: Path) -> str:
    fsspec.filesystem("memory").put(str(place), f"/bucket{place}", recursive=True)
    return f"memory://bucket{place}"


@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_local_source_is_rejected(
    parts: Path, tmp_path: Path, store: Store, layout: str, described: bool
) -> None:
    place = make(layout, tmp_path / "t", parts / "a", parts / "p" if described else None)
    with pytest.raises(REJECTED) as caught:
        store.stage(place, family=FAMILY)
    check_words(layout, place, str(caught.value))
    assert tree(store.root) == []


@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize("layout", REMOTE)
def test_a_remote_source_is_rejected_by_its_listing(
    parts: Path, tmp_path: Path, store: Store, layout: str, described: bool
) -> None:
    place = make(layout, tmp_path / "t", parts / "a", parts / "p" if described else None)
    given = remote(place)
    with pytest.raises(REJECTED) as caught:
        store.stage(given, family=FAMILY)
    check_words(layout, given, str(caught.value))
    assert tree(store.root) == []


@pytest.mark.parametrize("far", [False, True])
def test_a_profile_with_notes_is_a_profile_alone(
    parts: Path, tmp_path: Path, store: Store, far: bool
) -> None:
    place = tmp_path / "t"
    shutil.copytree(parts / "p", place)
    (place / "notes").mkdir()
    (place / "notes" / "shots.jsonl").write_text("{}")
    staged = store.stage(remote(place) if far else place, family=FAMILY)
    assert (staged.kind, staged.profile) == ("profile", a_profile(0.5))


@pytest.mark.parametrize("far", [False, True])
def test_an_adapter_with_a_trainers_leftovers_is_an_adapter(
    parts: Path, tmp_path: Path, store: Store, far: bool
) -> None:
    place = make("trainer's output with its arguments", tmp_path / "t", parts / "a", parts / "p")
    shutil.copytree(parts / "a", place, dirs_exist_ok=True)
    staged = store.stage(remote(place) if far else place, family=FAMILY)
    assert (staged.kind, staged.profile) == ("adapter", a_profile(0.5))


def test_an_adapter_needs_no_right_to_list(
    parts: Path, tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(self: Any, *_: Any, **__: Any) -> None:
        raise PermissionError("ListBucket denied")

    adapter, profile = remote(parts / "a"), remote(parts / "p")
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "ls", denied)
    assert store.stage(adapter, family=FAMILY).kind == "adapter"
    with pytest.raises(SourceError, match=r"cannot be read .ListBucket denied"):
        store.stage(profile, family=FAMILY)


def test_a_source_with_too_many_names_is_not_a_profile_alone(
    parts: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kinds, "MAX_ENTRIES", 3)
    for name in ("x/a.txt", "x/b.txt", "x/c.txt"):
        (parts / "p" / name).parent.mkdir(exist_ok=True)
        (parts / "p" / name).touch()
    for given in (parts / "p", remote(parts / "p")):
        with pytest.raises(AdapterRejectedError, match="more than 3 files"):
            store.stage(given, family=FAMILY)


@pytest.mark.parametrize("far", [False, True])
def test_an_adapter_that_appears_below_a_profile_while_it_is_read_is_noticed(
    parts: Path, store: Store, monkeypatch: pytest.MonkeyPatch, far: bool
) -> None:
    from safegene_server.artifacts.source import LocalSource

    given = remote(parts / "p") if far else str(parts / "p")
    kind: Any = RemoteSource if far else LocalSource
    chunks = kind.chunks

    def joined(self: Any, name: str) -> Iterator[bytes]:
        yield from chunks(self, name)
        if far:
            fsspec.filesystem("memory").pipe(f"{self.path}/sales/adapter_model.bin", b"x")
        else:
            (parts / "p" / "sales").mkdir()
            (parts / "p" / "sales" / "adapter_model.bin").touch()

    monkeypatch.setattr(kind, "chunks", joined)
    with pytest.raises(AdapterRejectedError, match=r"holds sales/adapter_model\.bin"):
        store.stage(given, family=FAMILY)
    assert tree(store.root) == []


def test_a_prefix_with_the_mark_of_a_directory_and_one_with_a_nameless_part() -> None:
    """`acme/` is a file of no bytes that some tools leave; `acme//x` has no readable path."""

    def entries(*names: dict[str, str]) -> list[tuple[str, str]]:
        class System:
            def ls(self, path: str, detail: bool) -> list[dict[str, str]]:
                assert (path, detail) == ("bucket/acme", True)
                return list(names)

        source = RemoteSource("s3://bucket/acme", System(), "bucket/acme")
        return [(entry.name, entry.form) for entry in source.entries("", 10)]

    mark = {"name": "bucket/acme/", "type": "file"}
    assert entries(mark, {"name": "bucket/acme/x", "type": "file"}) == [("x", "file")]
    assert entries({"name": "bucket/acme/y/", "type": "directory"}) == [("y", "directory")]
    assert entries({"name": "bucket/acme/", "type": "directory"}) == [("", "unseen")]


def test_a_web_servers_listing_decides(
    web: str,  # noqa: F811
    directory: Path,  # noqa: F811
    parts: Path,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    roots = directory.parent
    shutil.copytree(parts / "p", roots / "alone")
    make("named adapter", roots / "named", parts / "a", parts / "p")
    shutil.copytree(parts / "p", roots / "page")
    (roots / "page" / "index.html").write_text("<a href='/other/'>up</a> <a href='a.txt'>a</a>")
    assert store.stage(f"{web}/alone", family=FAMILY).kind == "profile"
    with pytest.raises(AdapterRejectedError, match=f"point at {web}/named/sales instead"):
        store.stage(f"{web}/named", family=FAMILY)
    with pytest.raises(AdapterRejectedError, match="its listing leaves out"):
        store.stage(f"{web}/page", family=FAMILY)


def test_a_web_server_that_lists_nothing_gives_no_profile_alone(
    web: str,  # noqa: F811
    directory: Path,  # noqa: F811
    parts: Path,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from test_artifacts_source import Web

    def denied(self: Web, path: str) -> None:
        self.send_error(404)

    monkeypatch.setattr(Web, "list_directory", denied)
    shutil.copytree(parts / "p", directory.parent / "alone")
    shutil.copytree(parts / "a", directory.parent / "adapter")
    with pytest.raises(SourceError, match="alone/ cannot be read"):
        store.stage(f"{web}/alone", family=FAMILY)
    assert store.stage(f"{web}/adapter", family=FAMILY).kind == "adapter"


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("layout", REMOTE)
def test_the_onboarding_job_fails_and_says_why(
    world: World,  # noqa: F811
    parts: Path,
    tmp_path: Path,
    layout: str,
    far: bool,
) -> None:
    world.store.rules = SourceRules(protocols=("memory",))
    place = make(layout, tmp_path / "t", parts / "a", parts / "p")
    given = remote(place) if far else str(place)
    world.json("POST", "/tenants", {"name": "acme/support", "source": given})
    job = world.work()
    assert job.state == "failed"
    check_words(layout, given, job.message or "")
    assert world.registry.revisions.list("acme/support") == () and world.replica.held == set()
    assert tree(world.store.root) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_declared_folder_is_logged_and_hurts_no_other(
    world: World,  # noqa: F811
    parts: Path,
    tmp_path: Path,
    layout: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "declared"
    place = make(layout, folder / "bad", parts / "a", parts / "p")
    shutil.copytree(parts / "p", folder / "good")
    with caplog.at_level(logging.ERROR, logger="vllm.safegene_server"):
        begun = asyncio.run(register_declared(world.tenancy, folder))
    assert "bad" not in begun and "good" in begun
    (line,) = [r.getMessage() for r in caplog.records if "tenant 'bad' of" in r.getMessage()]
    check_words(layout, place, line)
    assert "bad" not in {tenant.name for tenant in world.registry.tenants.list()}


def test_a_repeated_request_is_decided_again(parts: Path, tmp_path: Path) -> None:
    """A replica that fetches what was registered takes nothing less from a source that changed."""
    place = Path(shutil.copytree(parts / "a", tmp_path / "t"))
    digest = Store(tmp_path / "one").stage(place, family=FAMILY).digest
    shutil.rmtree(place)
    make("named adapter", place, parts / "a", parts / "p")
    other = Store(tmp_path / "other")
    with pytest.raises(SafegeneError, match=f"point at {place}/sales instead"):
        other.stage(place, family=FAMILY, expected=digest)
    assert tree(other.root) == []
