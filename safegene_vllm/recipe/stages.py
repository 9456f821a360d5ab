"""Stages of a long command: each one's result on disk with its digest, so that a rerun continues.

A directory belongs to one set of inputs; with others, the changed ones are reported and nothing is
mixed. Torch-free.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safegene_vllm.errors import ConfigError
from safegene_vllm.formats.file_io import plain_json, pretty_json, read_json, replace_file

ABOUT_FILE = "stages.json"


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

    Errors: ConfigError naming the changed inputs, if the directory holds results of others.
    """

    def __init__(
        self, directory: Path, inputs: Mapping[str, Any], *, restart: bool = False
    ) -> None:
        self.directory = directory
        self.inputs = plain_json(inputs, "inputs")
        if restart and directory.exists():
            self._check_own()
            shutil.rmtree(directory)
        self.done: dict[str, dict[str, Any]] = self._load()

    def _check_own(self) -> None:
        if not (self.directory / ABOUT_FILE).is_file():
            raise ConfigError(
                f"{self.directory} holds no {ABOUT_FILE}, so it is no unfinished run; move it away"
            )

    def _load(self) -> dict[str, dict[str, Any]]:
        if not self.directory.exists():
            return {}
        self._check_own()
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
        self.save()
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
        if self.directory.exists():
            self._check_own()
            shutil.rmtree(self.directory)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
