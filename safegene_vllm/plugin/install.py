"""Installation of the plugin's parts in vLLM: LoRA manager, model loader, worker methods.

Idempotent, because vLLM may call plugins more than once. Only the worker's constructor is wrapped:
every worker calls it, with or without LoRA, so a deployment that asks for SafeGene cannot start
without its checks.
"""

from __future__ import annotations

import functools
from typing import Any

from safegene_vllm.plugin import compat, rpc
from safegene_vllm.plugin.preflight import prepare_engine
from safegene_vllm.plugin.weight_guard import guard_weights


def install() -> None:
    """Install all parts in this process."""
    from safegene_vllm.plugin.lora_manager import SafegeneWorkerLoRAManager
    from safegene_vllm.plugin.model_loader import SafegeneModelLoader

    compat.resolve("lora_mixin").LRUCacheWorkerLoRAManager = SafegeneWorkerLoRAManager
    worker = compat.resolve("WorkerBase")
    if getattr(worker, "safegene_receipt", None) is not None:
        return
    compat.resolve("register_model_loader")("safegene")(SafegeneModelLoader)
    worker.__init__ = _checked(worker.__init__)
    worker.safegene_begin = rpc.safegene_begin
    worker.safegene_add = rpc.safegene_add
    worker.safegene_receipt = rpc.safegene_receipt


def _checked(init: Any) -> Any:
    """Wrap `WorkerBase.__init__` to check the engine's configuration before any weight loads."""

    @functools.wraps(init)
    def checked(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        plan = prepare_engine(vllm_config)
        init(self, vllm_config, *args, **kwargs)
        if plan is not None and plan.settings.family is not None:
            guard_weights(self, plan.settings.apply)

    return checked
