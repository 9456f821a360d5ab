"""What the benchmark changes in a running worker: its vector set aside, fewer profiles, weights.

vLLM mixes `Switch` into the worker of the benchmark's own servers (--worker-extension-cls). Two
arms are then one process with one memory, and their ratio holds nothing but what was switched.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from vllm.config import set_current_vllm_config

from safegene_vllm.errors import ConfigError
from safegene_vllm.plugin.ops.cpu_lora import CpuPunica
from safegene_vllm.plugin.ops.gain_table import GainPunica, GainTable
from safegene_vllm.plugin.ops.triton_lora import TritonPunica


def set_aside(runtime: Any) -> list[Callable[[], Any]]:
    """Take the safety product out of the layers, and its part of every step; what puts it back."""
    undo: list[Callable[[], Any]] = []
    for layer in runtime.manager.modules.values():
        wrapper = layer.punica_wrapper
        if isinstance(wrapper, CpuPunica) and wrapper.gain is not None:
            assert wrapper.weights is not None
            vector = wrapper.weights.vector_rows()
            for name in ("gain", "scale"):
                undo.append(partial(setattr, wrapper, name, getattr(wrapper, name)))
            undo.append(partial(vector.copy_, vector.clone()))
            wrapper.gain = wrapper.scale = None
            vector.zero_()  # the rows that every engine has, with a vector or without
        elif isinstance(wrapper, GainPunica | TritonPunica):
            undo.append(partial(layer.set_mapping, wrapper))
            layer.set_mapping(wrapper.inner)
    if undo:
        for name in ("table", "triton"):
            undo.append(partial(setattr, runtime.step, name, getattr(runtime.step, name)))
            setattr(runtime.step, name, None)
    return undo


def share_profiles(table: GainTable, count: int) -> list[Callable[[], Any]]:
    """Give slot s the gains of slot s modulo `count`; what gives it back its own."""
    own = table.rows.clone()
    slots = table.rows.shape[0] - 1
    table.rows[1:].copy_(own[1:][[slot % count for slot in range(slots)]])
    return [partial(table.rows.copy_, own)]


TURN = 6
"""Decode steps between two switches; steps with prompts are rare, and change turns one by one."""
Step = tuple[int, float]
"""Tokens, and seconds of the worker."""


@dataclass
class Turns:
    """A worker's steps, with its vector and without it in turn (A B, B A), each of them timed."""

    worker: Any
    theirs: Callable[[Any], Any]
    steps: dict[str, dict[str, list[Step]]] = field(
        default_factory=lambda: {to: {"decode": [], "prompt": []} for to in ("all", "aside")}
    )
    seen: Counter[str] = field(default_factory=Counter)
    state: str = "all"

    def __call__(self, scheduled: Any) -> Any:
        tokens = scheduled.total_num_scheduled_tokens
        if not tokens:
            return self.theirs(scheduled)
        kind = "prompt" if tokens > len(scheduled.num_scheduled_tokens) else "decode"
        turn = self.seen[kind] // (TURN if kind == "decode" else 1)
        self.seen[kind] += 1
        to = "all" if turn % 4 in (0, 3) else "aside"
        switched = to != self.state
        if switched:
            self.worker.switch_safety(to)
            self.state = to
        started = time.perf_counter()
        answer = self.theirs(scheduled)
        seconds = time.perf_counter() - started
        if kind == "prompt" or not switched:  # a short step pays for what the switch left cold
            self.steps[to][kind].append((tokens, seconds))
        return answer

    def told(self) -> dict[str, dict[str, float]]:
        """By state: the median decode step of the batch size seen most, and a prompt's token."""
        decode = [tokens for found in self.steps.values() for tokens, _ in found["decode"]]
        batch = statistics.mode(decode)
        return {
            to: {
                "decode_step_ms": 1e3
                * statistics.median(s for n, s in found["decode"] if n == batch),
                "prompt_token_us": 1e6 * _per_token(found["prompt"]),
            }
            for to, found in self.steps.items()
        }


def _per_token(steps: Sequence[Step]) -> float:
    return sum(seconds for _, seconds in steps) / sum(tokens for tokens, _ in steps)


class Switch:
    """Mixed into vLLM's worker."""

    def switch_safety(self: Any, to: str) -> int:
        """`all` is as served, `aside` without the safety product, a number N with N profiles.

        Returns how many things there are to put back. Errors: ConfigError if there are none, and
        for `aside` in a compiled engine, whose graphs hold what they were compiled with.
        """
        runtime = self.model_runner.lora_manager.safegene
        runtime.manager._last_mapping = None  # what the next step needs is prepared anew
        for put_back in self.__dict__.pop("_put_back", []):
            put_back()
        if to == "all":
            return 0
        if to == "aside":
            if not self.vllm_config.model_config.enforce_eager:
                raise ConfigError("a compiled engine keeps its vector; ask with --mode eager")
            self._put_back = set_aside(runtime)
        else:
            self._put_back = share_profiles(runtime.step.table, int(to))
        if not self._put_back:
            raise ConfigError(f"nothing to switch to {to!r}: this engine has no vector")
        return len(self._put_back)

    def take_turns(self: Any) -> None:
        """From the next step on: with the vector, and with it set aside, in turn."""
        self.execute_model = Turns(self, self.execute_model)

    def end_turns(self: Any) -> dict[str, dict[str, float]]:
        """As served again; what `Turns.told` tells."""
        turns = self.__dict__.pop("execute_model")
        self.switch_safety("all")
        told: dict[str, dict[str, float]] = turns.told()
        return told

    def switch_weights(self: Any, to: str) -> None:
        """`all` reads the checkpoint with the vector, as served; a path that checkpoint as it is.

        By vLLM's own reload of the model runner: the worker's is refused (plugin/weight_guard.py).
        """
        config = self.vllm_config
        where = ((config.load_config, "load_format"), (config.model_config, "model"))
        before = [getattr(part, name) for part, name in where]
        with set_current_vllm_config(config):
            try:
                if to != "all":
                    config.load_config.load_format = "safetensors"
                self.model_runner.reload_weights(weights_path=None if to == "all" else to)
            finally:
                for (part, name), value in zip(where, before, strict=True):
                    setattr(part, name, value)
