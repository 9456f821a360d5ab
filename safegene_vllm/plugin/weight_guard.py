"""Guard against replacing or discarding the weights of a running engine.

Wraps the worker's own methods that read, receive or drop weights (reachable by `collective_rpc`):
none of them repeats the checks made at start, so a receipt would describe weights that are gone.
Options with the same effect are rejected at start (preflight.py).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from safegene_vllm.errors import VllmCompatibilityError

REPLACING = ("reload_weights", "reset_weights", "update_config", "discard", "sleep")
"""Methods of vLLM's workers that change the weights, or where they come from."""


def guard_weights(worker: Any, apply: str | None) -> None:
    """Let `worker` load its weights once, and reject everything that would change them later.

    Call it before anything is loaded. With apply=weights the worker may sleep at level 1, which
    saves the weights and restores them.
    """
    guarded = {name: partial(_reject, worker, name) for name in REPLACING if hasattr(worker, name)}
    guarded["load_model"] = partial(_load_once, worker, worker.load_model)
    if apply == "weights" and "sleep" in guarded:
        guarded["sleep"] = partial(_sleep_lightly, worker, worker.sleep)
    for name, method in guarded.items():
        setattr(worker, name, method)


def _reject(worker: Any, name: str, *args: Any, **kwargs: Any) -> None:
    """Errors: VllmCompatibilityError, raised by the last rank only."""
    # vLLM's executor reads replies in rank order up to the first error; a reply that is left
    # unread would be taken for the reply to the next call.
    if worker.rank == worker.parallel_config.world_size - 1:
        raise VllmCompatibilityError(
            f"{name} would replace weights under a safety vector that was checked against those "
            "loaded at start; start an engine on the new weights instead."
        )


def _load_once(worker: Any, original: Any, **options: Any) -> None:
    worker.load_model = partial(_reject, worker, "load_model")
    original(**options)


def _sleep_lightly(worker: Any, original: Any, level: int = 1) -> None:
    if level > 1:
        return _reject(worker, f"sleep at level {level}")
    original(level)
