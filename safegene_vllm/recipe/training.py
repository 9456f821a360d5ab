"""Seeded training loop that can be interrupted at any step and continues with the same bytes.

The state (tensors, AdamW's moments, losses) is saved every half minute, on a stop and at the end.
The caller supplies the loss.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from safegene_vllm.errors import ConfigError, NonFiniteError
from safegene_vllm.formats.file_io import digest_of, read_json, replace_file
from safegene_vllm.formats.safetensors_file import read_tensors, serialize

SAVE_EVERY_S = 30.0
STATE_FILE = "state.safetensors"
ABOUT_FILE = "state.json"

Progress = Callable[[int, int, str], None]
"""Callback after every step: steps done, total steps, a short status."""


def silent(done: int, total: int, words: str) -> None:
    """A Progress that shows nothing."""


def check_ranges(
    settings: object, *, counts: Sequence[str], rates: Sequence[str], weights: Sequence[str] = ()
) -> None:
    """Check the ranges of the fields of `settings`. Errors: ConfigError naming each.

    `counts` are whole and at least 1, `rates` positive and finite, `weights` finite and at least 0.
    """
    errors = []
    for name in (*counts, *rates, *weights):
        value = getattr(settings, name)
        if name in counts and value < 1:
            errors.append(f"{name} is {value}, expected at least 1")
        elif name in rates and not 0.0 < value < math.inf:
            errors.append(f"{name} is {value}, expected a positive number")
        elif name in weights and not 0.0 <= value < math.inf:
            errors.append(f"{name} is {value}, expected 0 or more")
    if errors:
        raise ConfigError("; ".join(errors))


def weights_signature(directory: Path | None) -> list[list[object]]:
    """Name, size in bytes and modification time (ns) of the weight files, to detect changes."""
    if directory is None or not directory.is_dir():
        return []
    return [
        [path.name, (status := path.stat()).st_size, status.st_mtime_ns]
        for path in sorted(directory.glob("*.safetensors"))
    ]


@dataclass(frozen=True)
class Schedule:
    """Steps and learning rate: linear warm-up, then cosine to zero."""

    steps: int
    lr: float
    warmup_share: float = 0.06

    def __post_init__(self) -> None:
        check_ranges(self, counts=("steps",), rates=("lr",))

    def lr_at(self, step: int) -> float:
        """The learning rate of step `step`, from 0."""
        warmup = round(self.steps * self.warmup_share)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        share = (step - warmup) / max(1, self.steps - warmup)
        return self.lr * 0.5 * (1.0 + math.cos(math.pi * share))


class Run:
    """State of one training run in a directory; `job` identifies it.

    `models` are the directories of its initial weights: changed weights are another run.
    """

    def __init__(
        self,
        directory: Path | None,
        job: Mapping[str, object],
        models: Sequence[Path | None] = (),
    ) -> None:
        self.directory = directory
        self.job = digest_of(dict(job), "training run")
        self.models = [weights_signature(model) for model in models]
        self._saved_at = time.monotonic()

    def load(self) -> tuple[dict[str, torch.Tensor], dict[str, object]] | None:
        """Tensors and notes of the last save; None at the beginning.

        Errors: ConfigError if the directory holds another run.
        """
        if self.directory is None or not (self.directory / ABOUT_FILE).is_file():
            return None
        about = read_json(self.directory / ABOUT_FILE)
        if about["job"] != self.job or about.get("models", self.models) != self.models:
            raise ConfigError(
                f"{self.directory} holds an unfinished run with other settings, data or models; "
                "finish it with its own, or delete that directory to start over"
            )
        tensors = read_tensors(self.directory / about["file"])
        return tensors, about["notes"]

    def save(
        self, tensors: Mapping[str, torch.Tensor], notes: Mapping[str, object], *, now: bool
    ) -> None:
        """Save the state every SAVE_EVERY_S seconds, or `now`."""
        if self.directory is None:
            return
        if not now and time.monotonic() - self._saved_at < SAVE_EVERY_S:
            return
        # Two alternating files, tensors before notes, so that the notes name a complete one.
        old = self.directory / ABOUT_FILE
        last = json.loads(old.read_text())["file"] if old.is_file() else ""
        name = f"b-{STATE_FILE}" if last.startswith("a-") else f"a-{STATE_FILE}"
        plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        replace_file(self.directory / name, serialize(plain))
        about = {"job": self.job, "models": self.models, "file": name, "notes": dict(notes)}
        replace_file(self.directory / ABOUT_FILE, json.dumps(about).encode())
        self._saved_at = time.monotonic()

    def clear(self) -> None:
        """Remove the state once the result is written."""
        if self.directory is None:
            return
        for name in (ABOUT_FILE, f"a-{STATE_FILE}", f"b-{STATE_FILE}"):
            (self.directory / name).unlink(missing_ok=True)
        with suppress(OSError):
            self.directory.rmdir()


def train(
    parameters: Mapping[str, torch.Tensor],
    loss_at: Callable[[int], torch.Tensor],
    schedule: Schedule,
    run: Run,
    *,
    progress: Progress = silent,
    clip: float = 1.0,
) -> list[float]:
    """Minimize by AdamW, parameters in place; returns all losses, those before a stop included.

    Errors: NonFiniteError naming the step at which the loss is NaN or infinite.
    """
    names = list(parameters)
    tensors = [parameters[name] for name in names]
    optimizer = torch.optim.AdamW(tensors, lr=schedule.lr, weight_decay=0.0)
    losses: list[float] = []
    if (saved := run.load()) is not None:
        losses = [float(value) for value in saved[1]["losses"]]  # type: ignore[attr-defined]
        _restore(optimizer, names, tensors, saved[0], len(losses))
    with stop_requests() as stop_wanted:
        for step in range(len(losses), schedule.steps):
            for group in optimizer.param_groups:
                group["lr"] = schedule.lr_at(step)
            loss = loss_at(step)
            value = loss.item()
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"the loss is {value} at step {step + 1}; lower the learning rate "
                    f"({schedule.lr}) or look at the data"
                )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(tensors, clip)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(value)
            progress(step + 1, schedule.steps, f"loss {value:.3f}")
            stopping = stop_wanted()
            # The last step is saved too: writing the result may fail.
            now = stopping or step + 1 == schedule.steps
            run.save(_state(optimizer, names, tensors), {"losses": losses}, now=now)
            if stopping:
                raise KeyboardInterrupt(f"stopped after step {step + 1}; run it again to continue")
    return losses


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Context manager: Ctrl-C and SIGTERM set a flag, to be honored between steps.

    A second signal ends the process at once. Outside the main thread signals are unchanged.
    """
    received: list[int] = []
    before: dict[signal.Signals, Any] = {}

    def request(number: int, frame: object) -> None:
        for one, handler in before.items():
            signal.signal(one, handler)
        received.append(number)

    if threading.current_thread() is threading.main_thread():
        for one in (signal.SIGINT, signal.SIGTERM):
            before[one] = signal.signal(one, request)
    try:
        yield lambda: bool(received)
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _state(
    optimizer: torch.optim.Optimizer, names: list[str], tensors: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    state = dict(zip(names, tensors, strict=True))
    for name, tensor in zip(names, tensors, strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            state[f"{name}|{key}"] = optimizer.state[tensor][key]
    return state


def _restore(
    optimizer: torch.optim.Optimizer,
    names: list[str],
    tensors: list[torch.Tensor],
    saved: Mapping[str, torch.Tensor],
    steps: int,
) -> None:
    for name, tensor in zip(names, tensors, strict=True):
        tensor.data.copy_(saved[name])
        optimizer.state[tensor] = {
            "step": torch.tensor(float(steps)),
            "exp_avg": saved[f"{name}|exp_avg"].to(tensor.device),
            "exp_avg_sq": saved[f"{name}|exp_avg_sq"].to(tensor.device),
        }
