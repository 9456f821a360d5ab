"""Sources: what may be read, the errors otherwise, and the state of their files."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import hypothesis
import pytest
from hypothesis import strategies as st

from safegene_server.artifacts.source import LocalSource, RemoteSource, SourceRules, open_source
from safegene_vllm.errors import (
    AdapterRejectedError,
    ConfigError,
    MissingFileError,
    SafegeneError,
    SourceError,
)

MEMORY = SourceRules(protocols=("memory",))


def read(given: str | Path, name: str = "a", rules: SourceRules | None = None) -> bytes | None:
    with open_source(given, rules or SourceRules()) as source:
        return None if source.stat(name) is None else b"".join(source.chunks(name))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "roots" / "acme"
    directory.mkdir(parents=True)
    (directory / "a").write_bytes(b"content")
    return directory


@pytest.mark.parametrize("prefix", ["", "file://", "FILE://", "local://"])
def test_a_local_directory_is_read(directory: Path, prefix: str) -> None:
    assert read(f"{prefix}{directory}") == b"content"
    assert read(f"{prefix}{directory}", "b") is None


def test_a_remote_directory_is_read() -> None:
    fsspec.filesystem("memory").pipe("/bucket/acme/a", b"content")
    for given in ("memory://bucket/acme", "memory://bucket/acme/"):
        assert read(given, "a", MEMORY) == b"content"
        assert read(given, "b", MEMORY) is None
    assert read("memory://bucket", "acme", MEMORY) is None, "a directory is not a file"


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ("relative/path", SourceError, "absolute"),
        ("file://host/path", SourceError, "absolute"),
        ("", SourceError, "absolute"),
        ("/a/../b", AdapterRejectedError, r"'\.\.'"),
        ("/nowhere/at/all", MissingFileError, "not there"),
        ("/nul\0byte", SourceError, "one path"),
        ("/half\ud800", SourceError, "one path"),
        ("/two\nlines", SourceError, "one path"),
        ("/" + 300 * "n", SourceError, "cannot be read"),
        ("simplecache::s3://bucket/acme", SourceError, "one plain URL"),
        ("s3://bucket/x::file:///etc", SourceError, "one plain URL"),
        ("1s3://bucket", SourceError, "one plain URL"),
        ("http://169.254.169.254/latest", SourceError, "'http' is not allowed.*https"),
        ("memory://bucket/acme", SourceError, "'memory' is not allowed"),
        ("zip://file.zip", SourceError, "'zip' is not allowed"),
        ("s3://bucket/../other", AdapterRejectedError, "plain URL"),
        ("https://host/acme?token=secret", SourceError, "query"),
        ("https://user:secret@host/acme", SourceError, "storage options"),
        ("gopher://user:secret@host/acme", SourceError, "storage options"),
    ],
)
def test_what_is_no_source_has_a_named_error(
    given: str, error: type[SafegeneError], says: str
) -> None:
    with pytest.raises(error, match=says) as caught:
        read(given)
    assert "secret" not in str(caught.value)


@hypothesis.given(
    st.sampled_from(
        ["", "/", "file://", "/proc/self/", "s3://", "https://", "abfs://", "memory://"]
    ),
    st.text(st.characters(), max_size=40),
)
def test_any_words_are_a_directory_or_a_named_error(prefix: str, words: str) -> None:
    try:
        with open_source(prefix + words, MEMORY) as source:
            assert isinstance(source, LocalSource | RemoteSource)
    except SafegeneError as error:
        assert str(error)


def test_a_loop_of_links_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for given, rules in (
        (tmp_path / "a" / "x", SourceRules()),
        (tmp_path / "a" / "x", SourceRules(roots=(tmp_path / "a",))),
    ):
        with pytest.raises(SafegeneError, match="cannot be read"):
            read(given, rules=rules)


def test_a_file_is_no_source(directory: Path) -> None:
    with pytest.raises(MissingFileError, match="not a directory"):
        read(directory / "a")


def test_options_that_do_not_work_are_named_by_key_alone() -> None:
    rules = SourceRules(options={"s3": {"key": "secret", "protocol": "s3"}})
    with pytest.raises(ConfigError, match=r"'s3'.*keys: key, protocol") as caught:
        read("s3://bucket/acme", rules=rules)
    assert "secret" not in str(caught.value) + repr(rules)


def test_a_protocol_without_a_driver_is_a_setting_that_does_not_work() -> None:
    with pytest.raises(ConfigError, match=r"'nosuch'.*install"):
        read("nosuch://bucket", rules=SourceRules(protocols=("nosuch",)))


@pytest.mark.parametrize(
    ("protocol", "package"), [("s3", "'safegene-vllm[s3]'"), ("gs", "gcsfs"), ("az", "adlfs")]
)
def test_a_missing_driver_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, protocol: str, package: str
) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(ConfigError) as caught:
        read(f"{protocol}://bucket/acme")
    assert f"pip install {package}" in str(caught.value)


def test_only_what_is_below_a_root_is_read(directory: Path, tmp_path: Path) -> None:
    rules = SourceRules(roots=(tmp_path / "other", directory.parent))
    assert read(directory, rules=rules) == b"content"
    for outside in (tmp_path, tmp_path / "roots-too", directory.parent.with_name("root")):
        with pytest.raises(AdapterRejectedError, match=r"outside the allowed roots.*other"):
            read(outside, rules=rules)


def test_a_root_may_be_a_link_and_is_meant_by_both_its_names(
    directory: Path, tmp_path: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(directory.parent)
    for given in (link / "acme", directory):
        assert read(given, rules=SourceRules(roots=(link,))) == b"content"


@pytest.mark.parametrize("with_roots", [True, False])
def test_links_are_rejected(directory: Path, tmp_path: Path, with_roots: bool) -> None:
    rules = SourceRules(roots=(tmp_path,) if with_roots else ())
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    (directory / "link").symlink_to(secret)
    with pytest.raises(AdapterRejectedError, match="link is a symbolic link"):
        read(directory, "link", rules)
    (tmp_path / "link").symlink_to(directory)
    with pytest.raises(AdapterRejectedError, match="link is a symbolic link"):
        read(tmp_path / "link", rules=rules)


BLOB = "c" * 64


def snapshot(repository: Path, target: str = f"../../blobs/{BLOB}") -> Path:
    """As huggingface_hub caches a repository: links from a snapshot into the blobs."""
    (repository / "blobs").mkdir(parents=True)
    (repository / "blobs" / BLOB).write_bytes(b"content")
    (repository / "snapshots" / "main").mkdir(parents=True)
    (repository / "snapshots" / "main" / "a").symlink_to(target)
    return repository / "snapshots" / "main"


@pytest.mark.parametrize("root", ["hub", "hub/models--o--n", None])
def test_a_snapshot_of_the_hugging_face_cache_is_read(tmp_path: Path, root: str | None) -> None:
    found = snapshot(tmp_path / "hub" / "models--o--n")
    rules = SourceRules(roots=() if root is None else (tmp_path / root,))
    assert read(found, rules=rules) == b"content"
    (found.parents[1] / "blobs" / BLOB).unlink()
    with pytest.raises(SafegeneError, match="cannot be read"):
        read(found, rules=rules)


@pytest.mark.parametrize(
    "target",
    [
        "../../blobs/name",
        f"../../../blobs/{BLOB}",
        f"../../blobs/../blobs/{BLOB}",
        f"../../blobs/{BLOB}/",
        "/etc/passwd",
        "../../secret",
    ],
)
def test_any_other_link_of_a_snapshot_is_rejected(tmp_path: Path, target: str) -> None:
    found = snapshot(tmp_path / "hub" / "models--o--n", target)
    with pytest.raises(AdapterRejectedError, match="a is a symbolic link"):
        read(found, rules=SourceRules(roots=(tmp_path / "hub",)))


def test_blobs_that_lie_outside_the_root_or_are_links_are_not_read(tmp_path: Path) -> None:
    found = snapshot(tmp_path / "hub" / "models--o--n")
    for root in (found, found.parent):
        with pytest.raises(AdapterRejectedError, match="a is a symbolic link"):
            read(found, rules=SourceRules(roots=(root,)))
    rules = SourceRules(roots=(tmp_path / "hub",))
    blobs, elsewhere = found.parents[1] / "blobs", tmp_path / "elsewhere"
    (blobs / BLOB).rename(blobs / "real")
    (blobs / BLOB).symlink_to("real")
    with pytest.raises(AdapterRejectedError, match="a is a symbolic link"):
        read(found, rules=rules)
    (blobs / BLOB).unlink()
    (blobs / "real").rename(blobs / BLOB)
    blobs.rename(elsewhere)
    blobs.symlink_to(elsewhere)
    with pytest.raises(SafegeneError):
        read(found, rules=rules)


def test_a_link_between_root_and_directory_is_rejected(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "up").symlink_to(directory.parent)
    with pytest.raises(AdapterRejectedError, match="up is a symbolic link"):
        read(tmp_path / "up" / "acme", rules=SourceRules(roots=(tmp_path,)))


def test_a_link_that_appears_after_the_stat_is_not_followed(
    directory: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    with open_source(directory, SourceRules()) as source:
        assert source.stat("a") is not None
        (directory / "a").unlink()
        (directory / "a").symlink_to(tmp_path / "secret")
        with pytest.raises(AdapterRejectedError, match="a is a symbolic link"):
            list(source.chunks("a"))


def test_a_directory_that_is_swapped_meanwhile_stays_the_one_that_was_opened(
    directory: Path, tmp_path: Path
) -> None:
    with open_source(directory, SourceRules()) as source:
        directory.rename(tmp_path / "moved")
        directory.mkdir()
        (directory / "a").write_bytes(b"foreign")
        assert b"".join(source.chunks("a")) == b"content"


def test_special_files_are_rejected_without_blocking(directory: Path) -> None:
    os.mkfifo(directory / "fifo")
    (directory / "sub").mkdir()
    for name in ("fifo", "sub"):
        with pytest.raises(MissingFileError, match=f"{name} is not a plain file"):
            read(directory, name)


def test_a_fifo_that_appears_after_the_stat_does_not_block(directory: Path) -> None:
    with open_source(directory, SourceRules()) as source:
        assert source.stat("a") is not None
        (directory / "a").unlink()
        os.mkfifo(directory / "a")
        with pytest.raises(MissingFileError, match="not a plain file"):
            list(source.chunks("a"))


class Web(SimpleHTTPRequestHandler):
    """Files of a directory, as a plain web server has them; nothing below /forbidden."""

    def send_head(self) -> Any:
        if self.path.startswith("/forbidden"):
            self.send_error(403)
            return None
        return super().send_head()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web(directory: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Web, directory=directory.parent)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join(10)


def test_a_web_server_is_read_and_its_failures_are_not_taken_for_absence(web: str) -> None:
    rules = SourceRules(protocols=("http",))
    assert read(f"{web}/acme", rules=rules) == b"content"
    assert read(f"{web}/acme", "b", rules) is None
    with pytest.raises(SourceError, match=r"forbidden/a cannot be read .*403"):
        read(f"{web}/forbidden", rules=rules)
    with pytest.raises(SourceError, match=r"cannot be read .*[Cc]onnect"):
        read("http://127.0.0.1:9/acme", rules=rules)


def test_a_write_on_a_web_server_changes_the_stat(web: str, directory: Path) -> None:
    with open_source(f"{web}/acme", SourceRules(protocols=("http",))) as source:
        before = source.stat("a")
        assert before is not None
        assert source.stat("a") == before
        (directory / "a").write_bytes(b"CONTENT, longer")
        assert source.stat("a") != before


def test_a_write_changes_the_stat(directory: Path) -> None:
    with open_source(directory, SourceRules()) as source:
        before = source.stat("a")
        assert source.stat("a") == before
        status = (directory / "a").stat()
        (directory / "a").write_bytes(b"CONTENT")
        os.utime(directory / "a", ns=(status.st_atime_ns, status.st_mtime_ns))
        assert source.stat("a") != before, "same size, same time of modification"


def test_a_remote_write_changes_the_stat() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/change/a", b"content")
    with open_source("memory://bucket/change", MEMORY) as source:
        before = source.stat("a")
        assert source.stat("a") == before
        memory.pipe("/bucket/change/a", b"CONTENT")
        assert source.stat("a") != before
