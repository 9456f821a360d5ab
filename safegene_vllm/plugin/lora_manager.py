"""Subclasses of vLLM's LoRA managers, installed in place of them.

An adapter that is loaded, enters a slot or is removed is reported to the worker runtime; everything
else is vLLM's own behavior. Without a `safegene` key, vLLM runs unchanged, except that a tenant
with a profile is rejected.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safegene_vllm.errors import AdapterRejectedError
from safegene_vllm.formats.profile import has_profile
from safegene_vllm.plugin import compat
from safegene_vllm.plugin.preflight import read_engine_plan
from safegene_vllm.plugin.worker_runtime import WorkerRuntime

_WorkerManager: Any = compat.resolve("LRUCacheWorkerLoRAManager")
_ModelManager: Any = compat.resolve("LRUCacheLoRAModelManager")


class SafegeneModelManager(_ModelManager):
    """LoRA slots of the model; reports each adapter that enters a slot to `runtime`."""

    runtime: WorkerRuntime | None = None

    def activate_adapter(self, lora_id: int) -> bool:
        """Move an adapter into a slot and write the slot's gains, or remove it again."""
        full = None not in self.lora_index_to_id
        entered = bool(super().activate_adapter(lora_id))
        if entered and self.runtime is not None:
            if full:
                self.runtime.on_eviction(lora_id)
            try:
                self.runtime.on_activation(lora_id, self.lora_index_to_id.index(lora_id))
            except Exception:
                self.remove_adapter(lora_id)
                raise
        return entered


class SafegeneWorkerLoRAManager(_WorkerManager):
    """LoRA manager of a worker; `safegene` is its runtime, None without a `safegene` key."""

    safegene: WorkerRuntime | None = None

    def __init__(self, vllm_config: Any, device: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, device, *args, **kwargs)
        self._vllm_config = vllm_config
        self._plan = read_engine_plan(vllm_config)
        if self._plan is not None:
            self._manager_cls = SafegeneModelManager

    def create_lora_manager(self, *args: Any, **kwargs: Any) -> Any:
        """Wrap the model's layers, then place the vector in them."""
        model = super().create_lora_manager(*args, **kwargs)
        if self._plan is not None:
            manager = self._adapter_manager
            runtime = WorkerRuntime(self._plan, self._vllm_config, self.device, manager)
            self.safegene = manager.runtime = runtime
        return model

    def _load_adapter(self, lora_request: Any) -> Any:
        if self.safegene is not None:
            return self.safegene.load(lora_request)
        _reject_profile(lora_request)
        return super()._load_adapter(lora_request)

    def add_adapter(self, lora_request: Any) -> bool:
        """Load an adapter into a slot, unless its id or name is taken."""
        if self.safegene is not None:
            self.safegene.check_identity(lora_request)
        return bool(super().add_adapter(lora_request))

    def add_dummy_lora(self, lora_request: Any, rank: int) -> bool:
        """Add an adapter of vLLM's own warm-up; it has no gains."""
        if self.safegene is not None:
            self.safegene.dummies.add(lora_request.lora_int_id)
        return bool(super().add_dummy_lora(lora_request, rank))

    def remove_adapter(self, adapter_id: int) -> bool:
        """Remove an adapter and its staged copy."""
        removed = bool(super().remove_adapter(adapter_id))
        if self.safegene is not None:
            self.safegene.forget(adapter_id)
        return removed

    def remove_all_adapters(self) -> None:
        """Remove the adapters of the warm-up."""
        super().remove_all_adapters()
        if self.safegene is not None:
            self.safegene.dummies.clear()


def _reject_profile(lora_request: Any) -> None:
    """Errors: AdapterRejectedError for a tenant whose profile this engine cannot honor."""
    path = Path(lora_request.lora_path)
    if path.is_dir() and has_profile(path):
        raise AdapterRejectedError(
            f"tenant {lora_request.lora_name!r} carries a SafeGene profile, but this engine was "
            "started without a family. Start it with `safegene serve`, or add --additional-config "
            '\'{"safegene": {"family": "<family directory>"}}\'.'
        )
