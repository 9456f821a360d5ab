"""Worker methods for `collective_rpc`: prefetch an adapter, add it, report a receipt.

Results are plain values, because they cross process boundaries. A rejection is a result, not an
exception: vLLM's multiprocess executor leaves the other ranks' replies unread when one rank raises,
and every later reply would then belong to an earlier call.
"""

from __future__ import annotations

import logging
from typing import Any

from safegene_vllm.errors import SafegeneError
from safegene_vllm.plugin import compat

logger = logging.getLogger("vllm.safegene")


def safegene_receipt(self: Any, only: int | None = None) -> dict[str, Any] | None:
    """Return this worker's Receipt as a dictionary, or None without a `safegene` key.

    With `only`, the receipt lists no adapter but the one with this id.
    """
    rank, world_size = self.rank, self.parallel_config.world_size
    runtime = _runtime(self)
    if runtime is not None:
        receipt: dict[str, Any] = runtime.receipt(rank, world_size, only).to_dict()
        return receipt
    merged = getattr(self.model_runner.get_model(), "safegene_merged", None)
    return None if merged is None else merged.receipt(rank, world_size).to_dict()


def safegene_begin(self: Any, lora_name: str, lora_int_id: int, lora_path: str) -> bool:
    """Start reading and validating a tenant in a thread; return whether that has ended.

    Called repeatedly until it returns True, before `safegene_add`, which then only fills the slot
    while the engine's steps wait. Never raises: `safegene_add` reports what is wrong.
    """
    runtime = _runtime(self)
    if runtime is None or lora_int_id in runtime.tenants:
        return True
    request = compat.resolve("LoRARequest")(lora_name, lora_int_id, lora_path)
    return bool(runtime.prefetcher.begin(request))


def safegene_add(
    self: Any, lora_name: str, lora_int_id: int, lora_path: str, load_inplace: bool
) -> dict[str, Any]:
    """Stage, validate and load a tenant, and report; one call, because each waits for a step.

    Returns `rejected` (the reason, or None) and `receipt` (see `safegene_receipt`, this adapter
    only; None if rejected). Never raises.
    """
    request = compat.resolve("LoRARequest")(
        lora_name, lora_int_id, lora_path, load_inplace=load_inplace
    )
    runtime = _runtime(self)
    try:
        if runtime is not None:
            runtime.register(request)
        self.add_lora(request)
        return {"rejected": None, "receipt": safegene_receipt(self, lora_int_id)}
    except SafegeneError as error:
        reason = str(error)
    except Exception as error:
        logger.exception("tenant %r could not be loaded", lora_name)
        reason = f"{type(error).__name__}: {error}"
    finally:
        if runtime is not None:
            runtime.prefetcher.drop()
    return {"rejected": reason, "receipt": None}


def _runtime(worker: Any) -> Any:
    """Return the worker's WorkerRuntime, or None."""
    return getattr(getattr(worker.model_runner, "lora_manager", None), "safegene", None)
