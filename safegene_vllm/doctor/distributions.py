"""Installed distributions, from their metadata: versions, requirements, compiled modules."""

from __future__ import annotations

import mmap
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version


class Distributions:
    """The distributions on a path (default: sys.path), and pip's commands for them."""

    def __init__(self, path: Sequence[str] | None = None, python: str = sys.executable) -> None:
        self._path = sys.path if path is None else list(path)
        self._python = python
        self._found: dict[str, Distribution | None] = {}

    def get(self, name: str) -> Distribution | None:
        """Return the first distribution of this name, or None."""
        key = canonicalize_name(name)
        if key not in self._found:
            self._found[key] = next(iter(distributions(name=key, path=self._path)), None)
        return self._found[key]

    def version(self, name: str) -> Version | None:
        """Return the version of a distribution, or None if it is missing or has no valid one."""
        found = self.get(name)
        with suppress(InvalidVersion):
            return None if found is None else Version(found.version)
        return None

    def install(self, *arguments: str) -> str:
        """Return the command that installs `arguments` for this Python."""
        return self._command("install", *arguments)

    def uninstall(self, *names: str) -> str:
        """Return the command that uninstalls `names` for this Python."""
        return self._command("uninstall", *(() if self.get("pip") is None else ("-y",)), *names)

    def _command(self, action: str, *arguments: str) -> str:
        # uv makes environments without pip.
        if self.get("pip") is None:
            return shlex.join(("uv", "pip", action, "--python", self._python, *arguments))
        return shlex.join((self._python, "-m", "pip", action, *arguments))

    def unmet(self, requirements: Sequence[Requirement]) -> list[Requirement]:
        """Return the requirements that are missing or have another version."""
        return [
            requirement
            for requirement in requirements
            if (version := self.version(requirement.name)) is None
            or not requirement.specifier.contains(version, prereleases=True)
        ]

    def describe(self, requirement: Requirement) -> str:
        """Return a requirement with what is installed of it."""
        version = self.version(requirement.name)
        needed = f"{requirement.name}{requirement.specifier}"
        return f"{needed} ({'missing' if version is None else f'found {version}'})"


def requirements(distribution: Distribution, extra: str = "") -> list[Requirement]:
    """Return the requirements of a distribution that apply here, or those of one of its extras."""
    found = []
    for line in distribution.requires or ():
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        always = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and not (extra and always):
            found.append(requirement)
    return found


def links(distribution: Distribution, library: str) -> bool:
    """Whether a compiled module of the distribution names `library`, e.g. libtorch_cuda.so."""
    return any(_contains(module, library.encode()) for module in _modules(distribution))


def _modules(distribution: Distribution) -> Iterator[Path]:
    for file in distribution.files or ():
        if file.suffix == ".so":
            yield Path(str(distribution.locate_file(file)))


def _contains(path: Path, text: bytes) -> bool:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return data.find(text) >= 0
    except (OSError, ValueError):
        # Missing or empty: nothing to link against.
        return False
