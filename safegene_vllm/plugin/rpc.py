"""Methods a worker gains for `collective_rpc`: load this tenant, what is really applied?

For the API process and for operators' tools. Answers are plain, because they cross process
boundaries, and a refusal is an answer: vLLM's multiprocess executor leaves the other ranks' replies
unread when one rank raises, and every later answer is then one call old.
"""

from __future__ import annotations

import logging
from typing import Any

from safegene_vllm.errors import SafegeneError
from safegene_vllm.plugin import compat

logger = logging.getLogger("vllm.safegene")


def safegene_receipt(self: Any, only: int | None = None) -> dict[str, Any] | None:
    """This worker's Receipt as a dictionary, or None in an engine without a `safegene` key.

    With `only`, it tells of no adapter but the one with this id.
    """
    rank, world_size = self.rank, self.parallel_config.world_size
    runtime = _guest(self)
    if runtime is not None:
        receipt: dict[str, Any] = runtime.receipt(rank, world_size, only).to_dict()
        return receipt
    merged = getattr(self.model_runner.get_model(), "safegene_merged", None)
    return None if merged is None else merged.receipt(rank, world_size).to_dict()


def safegene_begin(self: Any, lora_name: str, lora_int_id: int, lora_path: str) -> bool:
    """Start to read and check a tenant in a thread; whether that has ended, well or not.

    Asked until it says so, before `safegene_add`, which then has only the slot to fill while the
    engine's steps wait for it. Never raises; what is wrong with the tenant, `safegene_add` tells.
    """
    runtime = _guest(self)
    if runtime is None or lora_int_id in runtime.tenants:
        return True
    request = compat.resolve("LoRARequest")(lora_name, lora_int_id, lora_path)
    return bool(runtime.arrivals.begin(request))


def safegene_add(
    self: Any, lora_name: str, lora_int_id: int, lora_path: str, load_inplace: bool
) -> dict[str, Any]:
    """Stage, validate and load a tenant, and report: one call, because each one waits for a step.

    Returns `refused` (why, or None) and `receipt` (as `safegene_receipt`, of this adapter alone;
    None if refused). A tenant is remembered until its adapter is removed (`remove_lora`); in place
    too. Never raises.
    """
    request = compat.resolve("LoRARequest")(
        lora_name, lora_int_id, lora_path, load_inplace=load_inplace
    )
    runtime = _guest(self)
    try:
        if runtime is not None:
            runtime.admit(request)
        self.add_lora(request)
        return {"refused": None, "receipt": safegene_receipt(self, lora_int_id)}
    except SafegeneError as error:
        reason = str(error)
    except Exception as error:
        logger.exception("tenant %r could not be loaded", lora_name)
        reason = f"{type(error).__name__}: {error}"
    finally:
        if runtime is not None:
            runtime.arrivals.drop()
    return {"refused": reason, "receipt": None}


def _guest(worker: Any) -> Any:
    """What serves tenants in this worker's slots, or None."""
    return getattr(getattr(worker.model_runner, "lora_manager", None), "safegene", None)
