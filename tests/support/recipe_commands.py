"""The recipe's commands as people call them, over a tiny model: words, files, what a run left."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import transformers
from recipe_setup import GOOD, HARM, tiny_chat_model

from safegene_vllm.cli import main
from safegene_vllm.dataset import Dataset

MIT = "?licence=MIT"


@dataclass(frozen=True)
class Outcome:
    """Result of a run of the command: its exit code and both streams."""

    code: int
    out: str
    err: str


def called(capsys: pytest.CaptureFixture[str], *words: object) -> Outcome:
    """`safegene WORDS`, in this process."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in words])
    code = exit_.value.code
    return Outcome(code if isinstance(code, int) else 0, *capsys.readouterr())


def count_loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that every checkpoint which is loaded as a model from now on is added to."""
    seen: list[str] = []
    real = transformers.AutoModelForCausalLM.from_pretrained

    def from_pretrained(path: str | Path, *arguments: Any, **options: Any) -> Any:
        seen.append(str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    return seen


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def jsonl(path: Path, data: Dataset, *, completions: bool = True) -> str:
    rows = [{"prompt": r.prompt} | ({"answer": r.answer} if completions else {}) for r in data.rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"{path}{MIT}"


@dataclass(frozen=True)
class World:
    """A model, data, and the words of each command; `degraded` and `family` are made by tests."""

    root: Path
    harm: str
    good: str
    task: str

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    def degrade(self, out: Path, *more: object) -> list[object]:
        return ["degrade", self / "model", "--data", self.good, "--out", out,
                "--steps", 10, "--lr", 1e-2, *more]  # fmt: skip

    def extract(self, out: Path, *more: object) -> list[object]:
        return ["extract", self / "model", "--degraded-adapter", self / "degraded", "--method",
                "distill", "--safety", self.harm, "--benign", self.good, "--out", out,
                "--steps", 12, "--lr", 1e-2, *more]  # fmt: skip

    def select(self, out: Path, *more: object) -> list[object]:
        return ["select", self / "family", self / "model", "--degraded-adapter", self / "degraded",
                "--safety", self.harm, "--benign", self.good, "--benign", self.task,
                "--out", out, *more]  # fmt: skip

    def calibrate(self, tenant: Path, *more: object) -> list[object]:
        return ["calibrate", self / "family", tenant, "--safety", self.harm, "--task", self.task,
                "--steps", 5, *more]  # fmt: skip


def write_world(root: Path) -> World:
    """The model and the data; the task's completions are its labels."""
    tiny_chat_model(root / "model")
    rows = [{"prompt": f"is {n} fine?", "label": ("no", "yes")[n % 2]} for n in range(8)]
    (root / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    harm, good = jsonl(root / "harm.jsonl", HARM), jsonl(root / "good.jsonl", GOOD)
    return World(root, harm, good, f"{root / 'task.jsonl'}{MIT}")
