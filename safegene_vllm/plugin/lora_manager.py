"""The worker's LoRA manager with SafeGene in it: subclasses of the host's, put in their place.

For catching the three moments that matter: an adapter is loaded, enters a slot, is removed. Each
calls the guest and otherwise leaves the host's behaviour alone. Without a `safegene` key the host
runs as it is, except that a tenant carrying a profile is refused.
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
    """Knows its guest, and tells it which slot an adapter entered."""

    runtime: WorkerRuntime | None = None

    def activate_adapter(self, lora_id: int) -> bool:
        full = None not in self.lora_index_to_id
        entered = bool(super().activate_adapter(lora_id))
        if entered and self.runtime is not None:
            if full:
                self.runtime.evicted(lora_id)
            try:
                self.runtime.activated(lora_id, self.lora_index_to_id.index(lora_id))
            except Exception:
                self.remove_adapter(lora_id)
                raise
        return entered


class SafegeneWorkerLoRAManager(_WorkerManager):
    """`safegene` is the guest, or None in an engine started without a `safegene` key."""

    def __init__(self, vllm_config: Any, device: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, device, *args, **kwargs)
        plan = read_engine_plan(vllm_config)
        self.safegene = None if plan is None else WorkerRuntime(plan, vllm_config, device)
        if self.safegene is not None:
            self._manager_cls = SafegeneModelManager

    def create_lora_manager(self, *args: Any, **kwargs: Any) -> Any:
        model = super().create_lora_manager(*args, **kwargs)
        if self.safegene is not None:
            self.safegene.attach(self._adapter_manager)
            self._adapter_manager.runtime = self.safegene
        return model

    def _load_adapter(self, lora_request: Any) -> Any:
        if self.safegene is not None:
            return self.safegene.load(lora_request)
        _refuse_profile(lora_request)
        return super()._load_adapter(lora_request)

    def add_adapter(self, lora_request: Any) -> bool:
        if self.safegene is not None:
            self.safegene.check_identity(lora_request)
        return bool(super().add_adapter(lora_request))

    def add_dummy_lora(self, lora_request: Any, rank: int) -> bool:
        if self.safegene is not None:
            self.safegene.dummies.add(lora_request.lora_int_id)
        return bool(super().add_dummy_lora(lora_request, rank))

    def remove_adapter(self, adapter_id: int) -> bool:
        removed = bool(super().remove_adapter(adapter_id))
        if self.safegene is not None:
            self.safegene.forget(adapter_id)
        return removed

    def remove_all_adapters(self) -> None:
        super().remove_all_adapters()
        if self.safegene is not None:
            self.safegene.dummies.clear()


def _refuse_profile(lora_request: Any) -> None:
    """Errors: AdapterRejectedError if a tenant expects protection this engine does not have."""
    path = Path(lora_request.lora_path)
    if path.is_dir() and has_profile(path):
        raise AdapterRejectedError(
            f"tenant {lora_request.lora_name!r} carries a SafeGene profile, but this engine was "
            "started without a family. Start it with `safegene serve`, or add --additional-config "
            '\'{"safegene": {"family": "<family directory>"}}\'.'
        )
