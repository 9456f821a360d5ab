"""Rounds kept on disk, so that a long run that was cut off goes on where it was.

One folder per commit, versions and machine, in it one per cell with all its settings in the name:
numbers of different code, machines or settings never meet. A round is kept whole: its ratios need
all arms measured next to each other. Anything else is measured again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cells import Cell
from ratios import Round
from safegene_vllm.formats.file_io import read_json, replace_file


@dataclass(frozen=True)
class Kept:
    """The results of one commit on one machine, below `root`."""

    root: Path
    origin: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        text = json.dumps(dict(self.origin), sort_keys=True)
        return (
            self.root / f"{self.origin['commit']}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        )

    def place(self, cell: Cell) -> Path:
        return self.folder / f"{cell.name}-{cell.digest}"

    def forget(self, cell: Cell) -> None:
        """Remove what was measured of this cell by this very code on this machine."""
        shutil.rmtree(self.place(cell), ignore_errors=True)

    def write(self, cell: Cell, kind: str, number: int, found: Round) -> None:
        """Keep one round, or one turn of starts. Whole or not at all."""
        path = self.place(cell) / f"{kind}-{number:03d}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = {"arms": {arm: dict(metrics) for arm, metrics in found.items()}}
        replace_file(path, json.dumps(data, indent=1).encode())

    def read(self, cell: Cell, kind: str) -> dict[int, Round]:
        """By number, what is kept and holds every arm of the cell."""
        found: dict[int, Round] = {}
        for path in sorted(self.place(cell).glob(f"{kind}-*.json")):
            arms: Round = read_json(path)["arms"]
            if all(arm.name in arms for arm in cell.arms):
                found[int(path.stem.rpartition("-")[2])] = arms
        return found

    def rounds(self, cell: Cell, kind: str = "round") -> Sequence[Round]:
        return list(self.read(cell, kind).values())

    def missing(self, cell: Cell, kind: str, count: int) -> list[int]:
        """Which of the numbers 0 to count - 1 are still to be measured."""
        there = self.read(cell, kind)
        return [number for number in range(count) if number not in there]
