"""A worker's private, immutable copy of every tenant it has admitted.

For loading again, after an eviction, exactly what was validated, even if the tenant's own directory
has changed or gone: a failure there would happen inside the engine's step and kill it. Not a cache
between processes: each worker owns its copies and removes them, and those of dead workers, itself.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

from safegene_vllm.errors import TenantRefusedError

FILES = ("adapter_config.json", "adapter_model.safetensors", "safegene.json")
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_PREFIX = "safegene-worker-"


class Staging:
    """The copies of one worker process; gone with it."""

    def __init__(self, parent: Path | None) -> None:
        parent = Path(tempfile.gettempdir()) if parent is None else parent
        parent.mkdir(parents=True, exist_ok=True)
        _remove_orphans(parent)
        self._directory = tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=parent)
        weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)

    def copy(self, source: Path, name: str, roots: Sequence[Path]) -> Path:
        """Copy the files of a tenant and return the copy's directory.

        Errors: TenantRefusedError (not below `roots`, through a symlink, unreadable, empty).
        """
        source = allowed(source, roots)
        target = Path(tempfile.mkdtemp(prefix="tenant-", dir=self._directory))
        try:
            found = [f for f in FILES if _copy_file(source / f, target / f, follow=not roots)]
            pickles = [f for f in PICKLES if (source / f).exists()]
        except OSError as error:
            shutil.rmtree(target)
            raise TenantRefusedError(
                f"tenant {name!r}: {source} cannot be read ({error}); give a readable directory of "
                "plain files."
            ) from error
        if not found or (pickles and FILES[1] not in found):
            shutil.rmtree(target)
            hint = f"only {', '.join(pickles)} (pickle, refused)" if pickles else "none of them"
            raise TenantRefusedError(
                f"tenant {name!r}: {source} holds {hint}; expected {', '.join(FILES)}, or "
                "safegene.json alone for a tenant that is only a profile."
            )
        return target

    def drop(self, directory: Path) -> None:
        shutil.rmtree(directory, ignore_errors=True)


def allowed(source: Path, roots: Sequence[Path]) -> Path:
    """The plain path of `source`, once it is seen to lie below one of `roots` (if any are given).

    Errors: TenantRefusedError if it lies elsewhere, or is reached through a symbolic link.
    """
    if not roots:
        return source
    plain = Path(os.path.normpath(source.absolute()))
    for root in roots:
        for top in (root.absolute(), root.resolve()):
            if plain.is_relative_to(top):
                _no_links(top, plain)
                return plain
    shown = ", ".join(str(r) for r in roots)
    raise TenantRefusedError(
        f"adapter path {source} is outside safegene.adapter_roots ({shown}); move the adapter "
        "below one of them or add its root."
    )


def _no_links(top: Path, plain: Path) -> None:
    """Errors: TenantRefusedError if any step from `top` down to `plain` is a symbolic link."""
    step = top
    for part in plain.relative_to(top).parts:
        step = step / part
        if step.is_symlink():
            raise TenantRefusedError(
                f"adapter path {plain} goes through the symbolic link {step}; with "
                "safegene.adapter_roots set, adapters must be plain directories below them."
            )


def _copy_file(source: Path, target: Path, *, follow: bool) -> bool:
    """Copy one file if it exists; never through a symlink unless `follow`."""
    try:
        handle = os.open(source, os.O_RDONLY | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW))
    except FileNotFoundError:
        return False
    with os.fdopen(handle, "rb") as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise OSError(f"{source.name} is not a plain file")
        with target.open("wb") as out:
            shutil.copyfileobj(stream, out, 1 << 20)
    target.chmod(0o400)
    return True


def _remove_orphans(parent: Path) -> None:
    """Delete copies whose worker is gone (killed workers cannot tidy up)."""
    for leftover in parent.glob(f"{_PREFIX}*"):
        pid = leftover.name.removeprefix(_PREFIX).split("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            shutil.rmtree(leftover, ignore_errors=True)
