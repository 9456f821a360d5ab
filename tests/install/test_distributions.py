"""Wheel and source distribution: built without an index, checked, and complete."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from safegene_vllm import __version__

ROOT = Path(__file__).parents[2]
ROOTS = {"safegene_vllm": ROOT, "safegene_server": ROOT / "server"}
NEVER = re.compile(r"(^|/)(tests?|benchmarks|examples|deploy|docs)/|\.py[co]$|__pycache__")


def tracked(*folders: str) -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--", *folders], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def run(*arguments: str, cwd: Path) -> str:
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with both, built from a copy of the tracked files."""
    source = tmp_path_factory.mktemp("source")
    for name in tracked():
        if not NEVER.search(name) or name.startswith(("tests/unit/test_cli", "docs/index")):
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    out = tmp_path_factory.mktemp("dist")
    run("build", "--no-isolation", "--outdir", str(out), cwd=source)
    return out


def wheel_names(dist: Path) -> set[str]:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_both_are_built_with_the_version_in_their_names(dist: Path) -> None:
    assert {path.name for path in dist.iterdir()} == {
        f"safegene_vllm-{__version__}-py3-none-any.whl",
        f"safegene_vllm-{__version__}.tar.gz",
    }


def test_the_package_index_accepts_them(dist: Path) -> None:
    run("twine", "check", "--strict", *map(str, dist.iterdir()), cwd=dist)


def test_the_checker_of_wheels_finds_nothing(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    # From the root: its settings are in pyproject.toml.
    run("check_wheel_contents", str(wheel), cwd=ROOT)


def test_the_wheel_holds_the_two_packages_with_their_data_and_nothing_else(dist: Path) -> None:
    expected = {
        name.removeprefix("server/") for name in tracked("safegene_vllm", "server/safegene_server")
    }
    assert {"safegene_vllm/py.typed", "safegene_server/py.typed"} <= expected
    assert {Path(name).suffix for name in expected} >= {".jsonl", ".html", ".css"}
    found = {name for name in wheel_names(dist) if ".dist-info/" not in name}
    assert found == expected


def test_the_source_distribution_builds_an_installation_for_a_cpu(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    assert {"requirements/cpu.txt", "LICENSE", "CHANGELOG.md", "pyproject.toml"} <= found
    assert [name for name in found if NEVER.search(name)] == []
