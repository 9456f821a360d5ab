"""Stages of a long command: each one's result on disk with its digest, so that a rerun continues.

A directory belongs to one set of inputs; with others, the changed ones are reported and nothing is
mixed. Torch-free.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from safegene_vllm.errors import ConfigError
from safegene_vllm.formats.file_io import plain_json, pretty_json, read_json, replace_file

ABOUT_FILE = "stages.json"
LOCK_FILE = "lock"


def digest_of_path(path: Path) -> str:
    """SHA-256 over the name and content of the file, or of every file below the directory."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        digest.update(f"{file.relative_to(path.parent)}\0{content}\n".encode())
    return "sha256:" + digest.hexdigest()


class Stages:
    """Results of stages below `directory`, for one set of `inputs` (JSON values by name).

    A context manager; until it is left, no other process can use the directory.

    Errors: ConfigError naming the changed inputs, if the directory holds results of others; if it
    is something else, or another process uses it.
    """

    def __init__(
        self, directory: Path, inputs: Mapping[str, Any], *, restart: bool = False
    ) -> None:
        self.directory = directory
        self.inputs = plain_json(inputs, "inputs")
        if directory.exists():
            self._check_own()
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = self._locked()
        try:
            self.done: dict[str, dict[str, Any]] = {} if restart else self._load()
        except BaseException:
            self._lock.close()
            raise
        if restart:
            self._delete()
        self.save()

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.close()

    def _locked(self) -> IO[bytes]:
        """The locked lock file: two runs must not share training states."""
        file = (self.directory / LOCK_FILE).open("ab")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise ConfigError(
                f"{self.directory} is in use by another run of this command; wait until it ends"
            ) from error
        return file

    def _delete(self) -> None:
        """Delete everything but the lock file."""
        for entry in self.directory.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != LOCK_FILE:
                entry.unlink()

    def _check_own(self) -> None:
        names = {entry.name for entry in self.directory.iterdir()}
        if ABOUT_FILE not in names and names - {LOCK_FILE}:
            raise ConfigError(
                f"{self.directory} holds no {ABOUT_FILE}, so it is no unfinished run; move it away"
            )

    def _load(self) -> dict[str, dict[str, Any]]:
        if not (self.directory / ABOUT_FILE).is_file():
            return {}
        about = read_json(self.directory / ABOUT_FILE)
        old, done = about.get("inputs"), about.get("stages")
        if not isinstance(old, dict) or not isinstance(done, dict):
            raise ConfigError(f"{self.directory / ABOUT_FILE} is no record of stages; move it away")
        changed = [key for key in {**old, **self.inputs} if old.get(key) != self.inputs.get(key)]
        if changed:
            listed = "; ".join(f"{k}: {_short(self.inputs.get(k))}, was {_short(old.get(k))}"
                               for k in changed)  # fmt: skip
            raise ConfigError(
                f"{self.directory} holds an unfinished run with other inputs. Changed: {listed}. "
                "Give the earlier ones to continue it, or --restart to discard it"
            )
        return done

    def result(self, name: str, make: Callable[[Path], None]) -> Path:
        """Path of the stage's result, a directory or a file; made by `make` unless it exists.

        Errors: ConfigError if the result changed after it was made; those of `make`.
        """
        path = self.directory / name
        if name in self.done:
            if not path.exists() or digest_of_path(path) != self.done[name]["digest"]:
                raise ConfigError(
                    f"{path} was changed after it was made; give --restart to make it again"
                )
            return path
        started = time.monotonic()
        make(path)
        self.done[name] = {
            "digest": digest_of_path(path),
            "seconds": round(time.monotonic() - started, 1),
        }
        self.save()
        return path

    def save(self) -> None:
        """Write the inputs and the finished stages."""
        about = {"inputs": self.inputs, "stages": self.done}
        replace_file(self.directory / ABOUT_FILE, pretty_json(about))

    def clear(self) -> None:
        """Delete all results, once the last one is written elsewhere."""
        shutil.rmtree(self.directory)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
