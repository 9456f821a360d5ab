"""Weights that would be replaced or discarded in a running engine: refused, by the worker itself.

For the worker's own methods that read, receive or drop weights, reached by `collective_rpc`: none
of them passes by what was checked at start, and a receipt would go on telling of weights that are
gone. Options that have the same effect are refused as the engine starts (engine.py).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from safegene_vllm.errors import VllmCompatibilityError

REPLACING = ("reload_weights", "reset_weights", "update_config", "discard", "sleep")
"""Methods of vLLM's workers after which the weights, or where they come from, are others."""


def guard_weights(worker: Any, apply: str | None) -> None:
    """In place, before anything is loaded: `worker` loads once, and then keeps what it has.

    With apply=weights it may sleep at level 1, which puts the weights aside and takes them back.
    """
    ours = {name: partial(_refuse, worker, name) for name in REPLACING if hasattr(worker, name)}
    ours["load_model"] = partial(_load_once, worker, worker.load_model)
    if apply == "weights" and "sleep" in ours:
        ours["sleep"] = partial(_sleep_lightly, worker, worker.sleep)
    for name, method in ours.items():
        setattr(worker, name, method)


def _refuse(worker: Any, name: str, *args: Any, **kwargs: Any) -> None:
    """Errors: VllmCompatibilityError, of the last rank alone: the host's executor reads the answers in order up
    to the first fault, and one left unread would be taken for that of the next call.
    """
    if worker.rank == worker.parallel_config.world_size - 1:
        raise VllmCompatibilityError(
            f"{name} would replace weights under a safety vector that was checked against those "
            "loaded at start; start an engine on the new weights instead."
        )


def _load_once(worker: Any, theirs: Any, **options: Any) -> None:
    worker.load_model = partial(_refuse, worker, "load_model")
    theirs(**options)


def _sleep_lightly(worker: Any, theirs: Any, level: int = 1) -> None:
    if level > 1:
        return _refuse(worker, f"sleep at level {level}")
    theirs(level)
