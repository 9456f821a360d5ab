"""A run stopped at any step, gently or by kill -9, ends in the bytes of one that was left alone."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from safegene_vllm.errors import ConfigError, NonFiniteError
from safegene_vllm.recipe import training
from safegene_vllm.recipe.training import (
    Run,
    Schedule,
    check_ranges,
    stop_requests,
    train,
    weights_signature,
)

ROOT = Path(__file__).parents[2]
STEPS = 7
JOB = {"what": "toy"}
Loss = Callable[[int], torch.Tensor]


class Toy:
    """Two tensors and a loss that depends on the step, so that a wrong step is another result."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.parameters = {
            name: torch.randn(shape, generator=generator, requires_grad=True)
            for name, shape in (("w", (3, 2)), ("v", (4,)))
        }

    def loss(self, step: int) -> torch.Tensor:
        w, v = self.parameters["w"], self.parameters["v"]
        return (w - step).square().mean() + (v.sum() - 0.1 * step).sin().square()

    def train(self, run: Run, loss: Loss | None = None, **options: object) -> list[float]:
        schedule = Schedule(STEPS, 0.1)
        return train(self.parameters, loss or self.loss, schedule, run, **options)  # type: ignore[arg-type]

    def bytes(self) -> bytes:
        return training.serialize(self.parameters)


@pytest.fixture(scope="module")
def alone() -> tuple[bytes, list[float]]:
    toy = Toy()
    losses = toy.train(Run(None, JOB))
    return toy.bytes(), losses


def hit_at(step: int, number: signal.Signals, toy: Toy) -> Loss:
    def loss(now: int) -> torch.Tensor:
        if now == step:
            signal.raise_signal(number)
        return toy.loss(now)

    return loss


def resumed(state: Path) -> tuple[bytes, list[float]]:
    toy = Toy()
    losses = toy.train(Run(state, JOB))
    return toy.bytes(), losses


# Stopped and taken up again


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", range(STEPS))
def test_stopped_at_any_step_it_ends_in_the_same_bytes(
    tmp_path: Path, alone: tuple[bytes, list[float]], step: int, number: signal.Signals
) -> None:
    toy = Toy()
    with pytest.raises(KeyboardInterrupt, match=f"after step {step + 1}; run it again"):
        toy.train(Run(tmp_path, JOB), hit_at(step, number, toy))
    assert toy.bytes() != alone[0] or step + 1 == STEPS
    assert resumed(tmp_path) == alone


def test_stopped_after_every_step_it_ends_in_the_same_bytes(
    tmp_path: Path, alone: tuple[bytes, list[float]]
) -> None:
    for step in range(STEPS):
        toy = Toy()
        with pytest.raises(KeyboardInterrupt):
            toy.train(Run(tmp_path, JOB), hit_at(step, signal.SIGINT, toy))
    assert resumed(tmp_path) == alone


def test_an_error_in_the_middle_costs_what_was_not_saved_and_no_more(
    tmp_path: Path, alone: tuple[bytes, list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY_S", 0.0)
    toy, seen = Toy(), list[int]()

    def loss(step: int) -> torch.Tensor:
        seen.append(step)
        if seen == [0, 1, 2, 3]:
            raise OSError("the disk is unavailable")
        return toy.loss(step)

    with pytest.raises(OSError, match="disk"):
        toy.train(Run(tmp_path, JOB), loss)
    toy = Toy()
    losses = toy.train(Run(tmp_path, JOB), loss)
    assert seen == [0, 1, 2, 3, 3, 4, 5, 6]
    assert (toy.bytes(), losses) == alone


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {paths!r}
from safegene_vllm.recipe import training
from test_recipe_training import JOB, Toy
training.SAVE_EVERY_S = 0.0
real, written = training.replace_file, []
def replace_file(path, data):
    # Every save is two files; the ninth file is the tensors of the fifth save, its notes the tenth.
    written.append(path)
    if len(written) == {files}:
        os.kill(os.getpid(), signal.SIGKILL)
    real(path, data)
training.replace_file = replace_file
Toy().train(training.Run(Path({state!r}), JOB))
"""


@pytest.mark.parametrize(("files", "steps_left"), [(9, 3), (10, 3)])
def test_killed_while_it_saves_it_resumes_from_the_save_before(
    tmp_path: Path, alone: tuple[bytes, list[float]], files: int, steps_left: int
) -> None:
    paths = [str(ROOT), str(ROOT / "tests" / "support"), str(ROOT / "tests" / "unit")]
    code = KILLED.format(paths=paths, files=files, state=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    toy, seen = Toy(), list[int]()

    def loss(step: int) -> torch.Tensor:
        seen.append(step)
        return toy.loss(step)

    losses = toy.train(Run(tmp_path, JOB), loss)
    assert seen == list(range(STEPS))[-steps_left:]
    assert (toy.bytes(), losses) == alone


def test_what_is_finished_is_not_trained_again(
    tmp_path: Path, alone: tuple[bytes, list[float]]
) -> None:
    """The last step is retained, so that a result that could not be written is not lost."""
    assert resumed(tmp_path) == alone
    toy = Toy()
    losses = toy.train(Run(tmp_path, JOB), lambda step: pytest.fail(f"step {step} again"))
    assert (toy.bytes(), losses) == alone


def test_between_saves_half_a_minute_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    saved: list[float] = []

    def replace_file(path: Path, data: bytes) -> None:
        if path.name == training.ABOUT_FILE:
            saved.append(now[0])

    monkeypatch.setattr(training, "replace_file", replace_file)

    def progress(done: int, total: int, words: str) -> None:
        now[0] += 12.0

    Toy().train(Run(tmp_path, JOB), progress=progress)
    # Steps end at 12, 24, ..., 84 s: the first one past 30 s, past 66 s, and the last.
    assert saved == [36.0, 72.0, 84.0]


# Whose state it is


def test_the_state_of_another_job_is_rejected_and_stays(
    tmp_path: Path, alone: tuple[bytes, list[float]]
) -> None:
    toy = Toy()
    with pytest.raises(KeyboardInterrupt):
        toy.train(Run(tmp_path, JOB), hit_at(3, signal.SIGINT, toy))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match=rf"{tmp_path} holds an unfinished run.*delete"):
        Toy().train(Run(tmp_path, {"what": "another"}))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert resumed(tmp_path) == alone


def test_the_state_belongs_to_the_weights_it_began_with(
    tmp_path: Path, alone: tuple[bytes, list[float]]
) -> None:
    model, state = tmp_path / "model", tmp_path / "state"
    model.mkdir()
    (model / "a.safetensors").write_bytes(b"1")
    toy = Toy()
    with pytest.raises(KeyboardInterrupt):
        toy.train(Run(state, JOB, [model, None]), hit_at(3, signal.SIGINT, toy))
    (model / "b.safetensors").write_bytes(b"2")
    with pytest.raises(ConfigError, match="other settings, data or models"):
        Toy().train(Run(state, JOB, [model, None]))
    (model / "b.safetensors").unlink()
    toy = Toy()
    assert (toy.train(Run(state, JOB, [model, None])), toy.bytes()) == alone[::-1]


def test_a_state_that_does_not_record_its_models_is_resumed(
    tmp_path: Path, alone: tuple[bytes, list[float]]
) -> None:
    toy = Toy()
    with pytest.raises(KeyboardInterrupt):
        toy.train(Run(tmp_path, JOB), hit_at(3, signal.SIGINT, toy))
    about = json.loads((tmp_path / "state.json").read_text())
    del about["models"]
    (tmp_path / "state.json").write_text(json.dumps(about))
    toy = Toy()
    assert (toy.train(Run(tmp_path, JOB, [tmp_path])), toy.bytes()) == alone[::-1]


def test_a_cleared_state_is_deleted_and_nothing_else(tmp_path: Path) -> None:
    state = tmp_path / "x.partial"
    run = Run(state, JOB)
    Toy().train(run)
    assert state.is_dir()
    run.clear()
    assert not state.exists()
    run.clear()
    Toy().train(run)
    (state / "mine.txt").write_text("retained")
    run.clear()
    assert [path.name for path in state.iterdir()] == ["mine.txt"]
    assert run.load() is None


def test_without_a_directory_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run(None, JOB)
    Toy().train(run)
    run.clear()
    assert list(tmp_path.iterdir()) == [] and run.load() is None


def test_weights_are_known_by_what_lies_on_the_disk(tmp_path: Path) -> None:
    assert (
        weights_signature(None)
        == weights_signature(tmp_path / "none")
        == weights_signature(tmp_path)
        == []
    )
    (tmp_path / "b.safetensors").write_bytes(b"12")
    (tmp_path / "a.safetensors").write_bytes(b"1")
    (tmp_path / "config.json").write_bytes(b"{}")
    first = weights_signature(tmp_path)
    assert [entry[:2] for entry in first] == [["a.safetensors", 1], ["b.safetensors", 2]]
    json.dumps(first)
    os.utime(tmp_path / "a.safetensors", ns=(0, 0))
    assert weights_signature(tmp_path) != first


# The loop itself


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_names_its_step(tmp_path: Path, value: float) -> None:
    toy = Toy()

    def loss(step: int) -> torch.Tensor:
        return toy.loss(step) * (value if step == 3 else 1.0)

    with pytest.raises(NonFiniteError, match=rf"loss is {value} at step 4; lower the learning"):
        toy.train(Run(tmp_path, JOB), loss)
    assert all(bool(tensor.isfinite().all()) for tensor in toy.parameters.values())


def test_it_is_adamw_with_clipped_gradients() -> None:
    """A loop of three lines over torch's own optimizer gives the same."""
    toy, other = Toy(), Toy()
    losses = toy.train(Run(None, JOB), clip=0.5)
    optimizer = torch.optim.AdamW(other.parameters.values(), weight_decay=0.0)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = Schedule(STEPS, 0.1).lr_at(step)
        loss = other.loss(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(other.parameters.values(), 0.5)
        optimizer.step()
        assert losses[step] == loss.item()
    assert toy.bytes() == other.bytes()


def test_progress_counts_all_steps_of_a_resumed_run_too(tmp_path: Path) -> None:
    reported: list[tuple[int, int]] = []

    def progress(done: int, total: int, words: str) -> None:
        assert words.startswith("loss ")
        reported.append((done, total))

    toy = Toy()
    with pytest.raises(KeyboardInterrupt):
        toy.train(Run(tmp_path, JOB), hit_at(2, signal.SIGINT, toy), progress=progress)
    toy.train(Run(tmp_path, JOB), progress=progress)
    assert reported == [(n, STEPS) for n in range(1, STEPS + 1)]


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    schedule = Schedule(100, 2.0, warmup_share=0.1)
    rates = [schedule.lr_at(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * n for n in range(1, 11)])
    for step in (10, 40, 99):
        assert rates[step] == pytest.approx(1 + math.cos(math.pi * (step - 10) / 90))
    assert max(rates) == rates[10] == 2.0 and 0.0 < rates[-1] < 0.001
    assert [Schedule(1, 2.0).lr_at(0), Schedule(1, 2.0, 1.0).lr_at(0)] == [2.0, 2.0]


def test_settings_out_of_range_are_reported_together() -> None:
    for steps, lr in ((0, 1.0), (1, 0.0), (1, -1.0), (1, math.nan), (1, math.inf)):
        with pytest.raises(ConfigError, match="expected"):
            Schedule(steps, lr)

    class Settings:
        steps, batch, lr, weight = 0, 1, math.nan, -1.0

    with pytest.raises(ConfigError) as rejected:
        check_ranges(Settings(), counts=("steps", "batch"), rates=("lr",), weights=("weight",))
    reported = str(rejected.value)
    assert "steps is 0" in reported and "lr is nan" in reported and "weight is -1.0" in reported
    assert "batch" not in reported


# Signals


def test_a_second_signal_ends_it_at_once() -> None:
    # A process that a shell starts in the background is born deaf to it.
    born = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt) as stopped, stop_requests() as stop_wanted:
        # Raised in this thread: other threads of a process may see the signal later.
        signal.raise_signal(signal.SIGINT)
        assert stop_wanted()
        signal.raise_signal(signal.SIGINT)
        pytest.fail("still there")
    assert not stopped.value.args
    assert signal.signal(signal.SIGINT, born) is signal.default_int_handler


def test_signals_are_handed_back() -> None:
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    with stop_requests() as stop_wanted:
        assert not stop_wanted()
        assert signal.getsignal(signal.SIGINT) is not before[0]
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before


def test_it_trains_in_a_thread_where_no_signal_arrives(alone: tuple[bytes, list[float]]) -> None:
    toy = Toy()
    thread = threading.Thread(target=lambda: toy.train(Run(None, JOB)))
    thread.start()
    thread.join()
    assert toy.bytes() == alone[0]
