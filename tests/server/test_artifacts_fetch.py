"""Copying a source: what is copied, and every way in which it can be incomplete or fail."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from artifact_files import a_tenant, content

from safegene_server.artifacts import source as source_module
from safegene_server.artifacts.fetch import Copied, Limits, Watch, fetch
from safegene_server.artifacts.source import LocalSource, RemoteSource, SourceRules
from safegene_vllm.errors import (
    AdapterRejectedError,
    MissingFileError,
    PickleRejectedError,
    SafegeneError,
    SourceError,
    StoreError,
)


@pytest.fixture
def into(tmp_path: Path) -> Path:
    (tmp_path / "into").mkdir()
    return tmp_path / "into"


def copy(given: str | Path, into: Path, **limits: Any) -> dict[str, Copied]:
    rules = SourceRules(protocols=("memory",))
    return fetch(given, into, rules=rules, limits=Limits(**limits))


def remote(tenant: Path) -> str:
    fsspec.filesystem("memory").put(str(tenant), f"/bucket{tenant}", recursive=True)
    return f"memory://bucket{tenant}"


@pytest.mark.parametrize("far", [False, True])
def test_the_known_files_and_no_others_are_copied_and_hashed(
    tmp_path: Path, into: Path, far: bool
) -> None:
    tenant = a_tenant(tmp_path / "acme", profile=1.0)
    wanted = content(tenant)
    (tenant / "optimizer.pt").write_bytes(b"x")
    (tenant / "README.md").write_bytes(b"x")
    copied = copy(remote(tenant) if far else tenant, into)
    assert content(into) == wanted
    assert len(wanted) == 3
    assert copied == {
        name: Copied(hashlib.sha256(data).hexdigest(), len(data)) for name, data in wanted.items()
    }
    assert {path.stat().st_mode & 0o777 for path in into.iterdir()} == {0o444}


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize(
    ("files", "error", "says"),
    [
        ([], MissingFileError, "has none of adapter_config.json, safegene.json"),
        (["adapter_config.json"], MissingFileError, "no adapter_model.safetensors.*upload"),
        (["adapter_model.safetensors"], MissingFileError, "no adapter_config.json"),
        (["adapter_config.json", "adapter_model.bin"], PickleRejectedError, "safe_serialization"),
        (["safegene.json", "adapter_model.pt"], PickleRejectedError, "adapter_model.pt"),
        (["config.json", "model.safetensors"], AdapterRejectedError, "full checkpoint"),
        (["config.json", "safegene.json"], AdapterRejectedError, "full checkpoint"),
        (
            ["adapter_config.json", "adapter_model.safetensors", "safegene-export.json"],
            AdapterRejectedError,
            "added twice",
        ),
    ],
)
def test_an_incomplete_tenant_is_rejected_before_anything_is_copied(
    tmp_path: Path, into: Path, far: bool, files: list[str], error: type[SafegeneError], says: str
) -> None:
    tenant = tmp_path / "acme"
    tenant.mkdir()
    for name in files:
        (tenant / name).write_bytes(b"{}")
    with pytest.raises(error, match=says) as caught:
        copy(remote(tenant) if far else tenant, into)
    assert str(tenant) in str(caught.value)
    assert content(into) == {}


@pytest.mark.parametrize("announced", [True, False])
def test_too_large_a_file_is_rejected(
    tmp_path: Path, into: Path, announced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant = a_tenant(tmp_path / "acme")
    size = (tenant / "adapter_model.safetensors").stat().st_size
    if not announced:
        look = RemoteSource.stat

        def silent(self: RemoteSource, name: str) -> source_module.Seen | None:
            seen = look(self, name)
            return None if seen is None else source_module.Seen(None, seen.stamp)

        monkeypatch.setattr(RemoteSource, "stat", silent)
    given = remote(tenant)
    with pytest.raises(SourceError, match=rf"safetensors has \d+ bytes.*allowed are {size - 1}"):
        copy(given, into, weights_bytes=size - 1)
    assert ("adapter_model.safetensors" in content(into)) == (not announced)
    for path in into.iterdir():
        path.unlink()
    assert copy(given, into, weights_bytes=size)["adapter_model.safetensors"].size_bytes == size
    for path in into.iterdir():
        path.unlink()
    with pytest.raises(SourceError, match=r"adapter_config.json has .* allowed are 10"):
        copy(given, into, json_bytes=10)


def test_an_upload_in_progress_while_we_read_is_noticed(
    tmp_path: Path, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant = a_tenant(tmp_path / "acme")
    other = content(a_tenant(tmp_path / "other", start=3))
    chunks = LocalSource.chunks

    def rewritten(self: LocalSource, name: str) -> Iterator[bytes]:
        yield from chunks(self, name)
        if name == "adapter_model.safetensors":
            (tenant / name).write_bytes(other[name])

    monkeypatch.setattr(LocalSource, "chunks", rewritten)
    with pytest.raises(SourceError, match=r"adapter_model.safetensors changed while it was read"):
        copy(tenant, into)


def test_a_profile_that_appears_while_we_read_is_noticed(
    tmp_path: Path, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant = a_tenant(tmp_path / "acme")
    chunks = LocalSource.chunks

    def joined(self: LocalSource, name: str) -> Iterator[bytes]:
        (tenant / "safegene.json").write_text("{}")
        yield from chunks(self, name)

    monkeypatch.setattr(LocalSource, "chunks", joined)
    with pytest.raises(SourceError, match=r"safegene.json changed"):
        copy(tenant, into)


def test_a_file_that_ends_early_is_noticed(
    tmp_path: Path, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = remote(a_tenant(tmp_path / "acme"))
    monkeypatch.setattr(RemoteSource, "chunks", lambda self, name: iter([b"{}"]))
    with pytest.raises(SourceError, match=r"announced with \d+ bytes, 2 were read"):
        copy(given, into)


def test_a_source_that_hangs_is_given_up_and_writes_nothing_more(
    tmp_path: Path, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = remote(a_tenant(tmp_path / "acme"))
    release = threading.Event()

    def hanging(self: RemoteSource, name: str) -> Iterator[bytes]:
        assert release.wait(20)
        yield b"late"

    monkeypatch.setattr(RemoteSource, "chunks", hanging)
    start_s = time.monotonic()
    with pytest.raises(SourceError, match=r"not read within 0.2 s"):
        copy(given, into, timeout_s=0.2)
    assert time.monotonic() - start_s < 120
    threads = [t for t in threading.enumerate() if t.name == "safegene-fetch"]
    assert threads
    release.set()
    for thread in threads:
        thread.join(10)
    assert all(data == b"" for data in content(into).values())


def test_a_fetch_can_be_followed_and_cancelled(
    tmp_path: Path, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant = a_tenant(tmp_path / "acme")
    monkeypatch.setattr(source_module, "CHUNK_BYTES", 64)
    sizes: list[int] = []
    rules, limits = SourceRules(), Limits()
    copied = fetch(tenant, into, rules=rules, limits=limits, watch=Watch(sizes.append))
    assert sizes[-1] == sum(file.size_bytes for file in copied.values())
    assert sizes == sorted(sizes)
    assert len(sizes) > 10
    (tmp_path / "again").mkdir()
    watch = Watch(lambda size_bytes: watch.cancelled.set() if size_bytes > 200 else None)
    with pytest.raises(SourceError, match="acme was cancelled"):
        fetch(tenant, tmp_path / "again", rules=rules, limits=limits, watch=watch)
    assert "safegene.json" not in content(tmp_path / "again")


def test_a_fetch_that_hangs_can_be_cancelled(
    tmp_path: Path, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, watch = threading.Event(), Watch()

    def hanging(self: LocalSource, name: str) -> Iterator[bytes]:
        watch.cancelled.set()
        assert release.wait(20)
        yield b"late"

    monkeypatch.setattr(LocalSource, "chunks", hanging)
    with pytest.raises(SourceError, match="was cancelled"):
        fetch(a_tenant(tmp_path / "a"), into, rules=SourceRules(), limits=Limits(), watch=watch)
    release.set()


def test_whatever_a_driver_raises_is_a_source_that_cannot_be_read(
    tmp_path: Path, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class DriverError(Exception):
        pass

    def fail(*_: object, **__: object) -> None:
        raise DriverError("connection reset")

    given = remote(a_tenant(tmp_path / "acme"))
    memory = type(fsspec.filesystem("memory"))
    for method in ("open", "info"):
        with monkeypatch.context() as patch:
            patch.setattr(memory, method, fail)
            with pytest.raises(SourceError, match=r"cannot be read .connection reset"):
                copy(given, into)
        for path in into.iterdir():
            path.unlink()


def test_a_failing_disk_of_ours_is_not_blamed_on_the_source(tmp_path: Path, into: Path) -> None:
    tenant = a_tenant(tmp_path / "acme")
    into.rmdir()
    with pytest.raises(StoreError, match="into cannot be written"):
        copy(tenant, into)
