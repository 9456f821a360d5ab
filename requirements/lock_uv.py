"""`make lock`: uv.lock, with torch's CPU build under PyTorch's index wherever it was found.

With PIP_FIND_LINKS torch comes from that directory, and its address is rewritten, so that the lock
file names public indexes only. Its digest is left out then: a mirror may have repacked the wheel.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
READ = ("pyproject.toml", "uv.lock", "README.md", "LICENSE")


def with_mirror(pyproject: str, mirror: str) -> str:
    """Return pyproject.toml with a directory of wheels in the place of PyTorch's index."""
    return pyproject.replace(f'url = "{CPU_INDEX}"', f'url = "{mirror}"\nformat = "flat"')


def rewritten(lock: str) -> str:
    """Return the lock file with PyTorch's index in the place of a directory of wheels."""

    def wheel(match: re.Match[str]) -> str:
        return f'{{ url = "{CPU_INDEX}/{match[1].replace("+", "%2B")}" }}'

    lock = re.sub(r'\b(registry|index) = "(?!https://)[^"]+"', rf'\1 = "{CPU_INDEX}"', lock)
    return re.sub(r'\{ path = "(?:[^"]*/)?(torch-[^/"]+\.whl)"[^}]*\}', wheel, lock)


def main(uv: str, *options: str) -> None:
    """Write uv.lock with the program `uv`."""
    mirror = os.environ.get("PIP_FIND_LINKS")
    command = [str(Path(uv).resolve()), "lock", "--quiet", "--python", "3.11", *options]
    if not mirror:
        subprocess.run(command, cwd=ROOT, check=True)
        return
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        for file in READ:
            if (ROOT / file).exists():
                shutil.copy(ROOT / file, place)
        for package in ("safegene_vllm", "server/safegene_server"):
            (place / package).mkdir(parents=True)
            shutil.copy(ROOT / package / "__init__.py", place / package)
        project = place / "pyproject.toml"
        project.write_text(with_mirror(project.read_text(), mirror))
        subprocess.run(command, cwd=place, check=True)
        (ROOT / "uv.lock").write_text(rewritten((place / "uv.lock").read_text()))


if __name__ == "__main__":
    main(*sys.argv[1:])
