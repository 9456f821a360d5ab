"""Worker extension of the benchmark: disables the vector, shares profiles, reloads weights.

vLLM mixes `Switch` into the worker of the benchmark's own servers (--worker-extension-cls). Two
arms are then one process with one memory, and their ratio contains only what was switched.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from vllm.config import set_current_vllm_config

from safegene_vllm.errors import ConfigError
from safegene_vllm.plugin.ops.cpu_lora import CpuPunica
from safegene_vllm.plugin.ops.gain_table import GainPunica, GainTable
from safegene_vllm.plugin.ops.triton_lora import TritonPunica

Undo = list[Callable[[], Any]]
"""Calls that restore what was changed."""
STEPS_PER_TURN = 6
"""Decode steps between two switches. Steps with prompts are rare and switch one by one."""


def disable_vector(runtime: Any) -> Undo:
    """Remove the safety product from every layer and its share of every step."""
    undo: Undo = []
    for layer in runtime.manager.modules.values():
        wrapper = layer.punica_wrapper
        if isinstance(wrapper, CpuPunica) and wrapper.gain is not None:
            assert wrapper.weights is not None
            vector = wrapper.weights.vector_rows()
            for name in ("gain", "scale"):
                undo.append(partial(setattr, wrapper, name, getattr(wrapper, name)))
            undo.append(partial(vector.copy_, vector.clone()))
            wrapper.gain = wrapper.scale = None
            vector.zero_()  # these rows exist in every engine, with a vector or without
        elif isinstance(wrapper, GainPunica | TritonPunica):
            undo.append(partial(layer.set_mapping, wrapper))
            layer.set_mapping(wrapper.inner)
    if undo:
        for name in ("table", "triton"):
            undo.append(partial(setattr, runtime.step, name, getattr(runtime.step, name)))
            setattr(runtime.step, name, None)
    return undo


def share_profiles(table: GainTable, count: int) -> Undo:
    """Give slot s the gains of slot s modulo `count`."""
    own = table.rows.clone()
    slots = table.rows.shape[0] - 1
    table.rows[1:].copy_(own[1:][[slot % count for slot in range(slots)]])
    return [partial(table.rows.copy_, own)]


@dataclass
class TimedSteps:
    """Replacement of a worker's `execute_model`: times its steps with and without the vector.

    The states alternate A B B A. `steps`: (tokens, seconds) by state and kind of step.
    """

    worker: Any
    execute_model: Callable[[Any], Any]
    steps: dict[str, dict[str, list[tuple[int, float]]]] = field(
        default_factory=lambda: {state: {"decode": [], "prompt": []} for state in ("all", "aside")}
    )
    count: Counter[str] = field(default_factory=Counter)
    state: str = "all"

    def __call__(self, scheduled: Any) -> Any:
        tokens = scheduled.total_num_scheduled_tokens
        if not tokens:
            return self.execute_model(scheduled)
        kind = "prompt" if tokens > len(scheduled.num_scheduled_tokens) else "decode"
        turn = self.count[kind] // (STEPS_PER_TURN if kind == "decode" else 1)
        self.count[kind] += 1
        state = "all" if turn % 4 in (0, 3) else "aside"
        switched = state != self.state
        if switched:
            self.worker.switch_safety(state)
            self.state = state
        started = time.perf_counter()
        output = self.execute_model(scheduled)
        seconds = time.perf_counter() - started
        if kind == "prompt" or not switched:  # a short step pays for what the switch left cold
            self.steps[state][kind].append((tokens, seconds))
        return output

    def medians(self) -> dict[str, dict[str, float]]:
        """By state: the median decode step of the commonest batch size, and time per token."""
        batch = statistics.mode(n for steps in self.steps.values() for n, _ in steps["decode"])

        def numbers(steps: dict[str, list[tuple[int, float]]]) -> dict[str, float]:
            decode_s = statistics.median(s for n, s in steps["decode"] if n == batch)
            prompt_s = sum(s for _, s in steps["prompt"]) / sum(n for n, _ in steps["prompt"])
            return {"decode_step_ms": 1e3 * decode_s, "prompt_token_us": 1e6 * prompt_s}

        return {state: numbers(steps) for state, steps in self.steps.items()}


class Switch:
    """Mixed into vLLM's worker."""

    def switch_safety(self: Any, state: str) -> int:
        """Switch to `all` (as served), `aside` (no vector), or a number N (N distinct profiles).

        Returns the number of changes to restore. Raises: ConfigError if nothing can be changed, and
        for `aside` in a compiled engine, whose graphs contain the vector.
        """
        runtime = self.model_runner.lora_manager.safegene
        runtime.manager._last_mapping = None  # the next step prepares its metadata again
        for restore in self.__dict__.pop("_undo", []):
            restore()
        if state == "all":
            return 0
        if state == "aside":
            if not self.vllm_config.model_config.enforce_eager:
                raise ConfigError("a compiled engine keeps its vector; run with --mode eager")
            self._undo = disable_vector(runtime)
        else:
            self._undo = share_profiles(runtime.step.table, int(state))
        if not self._undo:
            raise ConfigError(f"nothing to switch to {state!r}: this engine has no vector")
        return len(self._undo)

    def start_timed_steps(self: Any) -> None:
        """Time every step from the next one on, with and without the vector in turn."""
        self.execute_model = TimedSteps(self, self.execute_model)

    def end_timed_steps(self: Any) -> dict[str, dict[str, float]]:
        """Restore the worker and return `TimedSteps.medians`."""
        timed = self.__dict__.pop("execute_model")
        self.switch_safety("all")
        medians: dict[str, dict[str, float]] = timed.medians()
        return medians

    def switch_weights(self: Any, state: str) -> None:
        """Reload the checkpoint with the vector (`all`), or another checkpoint by its path as is.

        Uses the model runner's reload: the worker's is rejected (plugin/weight_guard.py).
        """
        config = self.vllm_config
        settings = ((config.load_config, "load_format"), (config.model_config, "model"))
        before = [getattr(part, name) for part, name in settings]
        with set_current_vllm_config(config):
            try:
                if state != "all":
                    config.load_config.load_format = "safetensors"
                self.model_runner.reload_weights(weights_path=None if state == "all" else state)
            finally:
                for (part, name), value in zip(settings, before, strict=True):
                    setattr(part, name, value)
