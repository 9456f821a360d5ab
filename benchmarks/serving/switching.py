"""What the benchmark changes in a running worker: its vector set aside, fewer profiles, weights.

vLLM mixes `Switch` into the worker of the benchmark's own servers (--worker-extension-cls). Two
arms are then one process with one memory, and their ratio holds nothing but what was switched.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from vllm.config import set_current_vllm_config

from safegene_vllm.errors import ConfigError
from safegene_vllm.plugin.fused import FusedPunica
from safegene_vllm.plugin.gain import GainPunica, GainTable
from safegene_vllm.plugin.segment import SegmentPunica, StepPlan


def set_aside(guest: Any) -> list[Callable[[], Any]]:
    """Take the safety product out of the layers, and its part of every step; what puts it back."""
    undo: list[Callable[[], Any]] = []
    for layer in guest.manager.modules.values():
        wrapper = layer.punica_wrapper
        if isinstance(wrapper, SegmentPunica) and wrapper.safety and (store := wrapper.store):
            vector = store.a[:, store.slots * store.rank :]
            undo.append(partial(setattr, wrapper, "safety", wrapper.safety))
            undo.append(partial(vector.copy_, vector.clone()))
            wrapper.safety = []
            vector.zero_()  # the rows that every engine has, with a vector or without
        elif isinstance(wrapper, GainPunica | FusedPunica):
            undo.append(partial(layer.set_mapping, wrapper))
            layer.set_mapping(wrapper.inner)
    if undo:
        listening = list(guest.listeners)
        undo.append(partial(guest.listeners.__setitem__, slice(None), listening))
        guest.listeners[:] = [one for one in listening if isinstance(one, StepPlan)]
    return undo


def share_profiles(table: GainTable, count: int) -> list[Callable[[], Any]]:
    """Give slot s the gains of slot s modulo `count`; what gives it back its own."""
    own = table.rows.clone()
    slots = table.rows.shape[0] - 1
    table.rows[1:].copy_(own[1:][[slot % count for slot in range(slots)]])
    return [partial(table.rows.copy_, own)]


class Switch:
    """Mixed into vLLM's worker."""

    def switch_safety(self: Any, to: str) -> int:
        """`all` is as served, `aside` without the safety product, a number N with N profiles.

        Returns how many things there are to put back. Errors: ConfigError if there are none, and
        for `aside` in a compiled engine, whose graphs hold what they were compiled with.
        """
        guest = self.model_runner.lora_manager.safegene
        for put_back in self.__dict__.pop("_put_back", []):
            put_back()
        if to == "all":
            return 0
        if to == "aside":
            if not self.vllm_config.model_config.enforce_eager:
                raise ConfigError("a compiled engine keeps its vector; ask with --mode eager")
            self._put_back = set_aside(guest)
        else:
            self._put_back = share_profiles(guest.table, int(to))
        if not self._put_back:
            raise ConfigError(f"nothing to switch to {to!r}: this engine has no vector")
        return len(self._put_back)

    def switch_weights(self: Any, to: str) -> None:
        """`all` reads the checkpoint with the vector, as served; a path that checkpoint as it is.

        By vLLM's own reload of the model runner: the worker's is refused (plugin/replacing.py).
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
