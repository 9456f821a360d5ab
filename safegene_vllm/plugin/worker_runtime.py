"""SafeGene in one worker with LoRA slots: the vector, the validated tenants, their gain rows.

lora_manager.py connects it to vLLM's LoRA manager, rpc.py to the API process.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from safegene_vllm.composition import compose_adapter
from safegene_vllm.errors import AdapterRejectedError, ReceiptError, VllmCompatibilityError
from safegene_vllm.formats.adapter import Adapter, LoRAWeights, layer_of
from safegene_vllm.formats.family import load_family
from safegene_vllm.formats.receipt import AdapterReceipt, Receipt, gain_digest
from safegene_vllm.plugin import compat
from safegene_vllm.plugin.adapter_prefetch import AdapterPrefetcher
from safegene_vllm.plugin.ops.cpu_lora import CpuBatchMetadata, CpuPunica
from safegene_vllm.plugin.ops.gain_table import GainTable
from safegene_vllm.plugin.ops.step_state import StepPunica, StepState
from safegene_vllm.plugin.preflight import EnginePlan
from safegene_vllm.plugin.resident_vector import ResidentVector, check_vector, place_vector
from safegene_vllm.plugin.staging import Staging
from safegene_vllm.plugin.target_modules import EngineShape, TargetModuleMap
from safegene_vllm.plugin.validation import AdapterValidator, Tenant
from safegene_vllm.settings import KEY


class WorkerRuntime:
    """State of one worker; made once vLLM's LoRA manager has wrapped the model's layers.

    Places the vector before any forward pass. Errors: VllmCompatibilityError naming the sites of
    the vector that this engine has no LoRA layer for; FormatError.
    """

    def __init__(self, plan: EnginePlan, vllm_config: Any, device: torch.device, manager: Any):
        started_s = time.perf_counter()
        self.plan = plan
        self.settings = plan.settings
        self.device = device
        self.manager = manager
        self.lora_dtype = vllm_config.lora_config.lora_dtype
        self.prefix_cache = bool(vllm_config.cache_config.enable_prefix_caching)
        self.family = None if plan.header is None else load_family(plan.settings.family or Path())
        self.tenants: dict[int, Tenant] = {}
        self.dummies: set[int] = set()
        self.evictions = 0
        self._adapter_bytes: dict[int, int] = {}
        self._loaded_content: dict[tuple[str, str], str] = {}
        sites = () if plan.header is None else plan.header.sites
        self._sites_by_layer = Counter(layer_of(site) for site in sites)
        self.modules = TargetModuleMap(manager)
        dtype = vllm_config.model_config.dtype
        max_rank = vllm_config.lora_config.max_lora_rank
        engine = EngineShape(self.modules, max_rank, frozenset({dtype, self.lora_dtype}))
        self.staging = Staging(plan.settings.staging_dir)
        validator = AdapterValidator(
            self.settings, self.family, engine, self.staging, self._with_same_weights
        )
        self.prefetcher = AdapterPrefetcher(validator.validate, self.staging.drop)
        self.step = self._wrap_punica(max_rank)
        self.vector = ResidentVector()
        if self.family is not None:
            check_vector(engine, self.family.lora_weights)
        if self.family is not None and self.step.table is not None:
            self.vector = place_vector(
                self.family.lora_weights,
                manager,
                self.modules,
                self.step,
                kernels=self.settings.kernels,
                dtype=dtype,
                device=device,
            )
            if device.type == "cuda":
                # Part of the key of vLLM's compile cache.
                raw = dict(vllm_config.additional_config[KEY])
                layers = f"{self.vector.kernel_layers} of {self.vector.layers} layers"
                vllm_config.additional_config[KEY] = raw | {"kernels_used": layers}
            if plan.base_profile is not None:
                self.step.write_gains(-1, plan.base_profile.coefficients)
        self._load_s = time.perf_counter() - started_s

    def _wrap_punica(self, max_rank: int) -> StepState:
        """Wrap vLLM's shared punica wrapper, and on CPU each layer's; return the step's state."""
        manager = self.manager
        wrappers = manager.punica_wrapper_mapping
        if len(wrappers) != 1:
            raise VllmCompatibilityError(
                f"found {len(wrappers)} LoRA wrappers ({', '.join(wrappers)}); SafeGene supports "
                "language models without tower or connector LoRA."
            )
        ((name, shared),) = wrappers.items()
        max_tokens = shared._token_lora_indices.shape[0]
        step, layers, vector_rank = StepState(), 0, 0
        if self.family is not None and self.settings.apply == "gain":
            layers = self.family.header.base.num_layers
            vector_rank = self.family.header.max_rank
            step.table = GainTable(manager.lora_slots, layers, max_tokens, self.device)
        if self.device.type == "cpu":
            step.cpu = CpuBatchMetadata(
                manager.lora_slots,
                max_rank,
                max_tokens,
                dtype=self.lora_dtype,
                vector_rank=vector_rank,
                layers=layers,
            )
            linear = compat.resolve("BaseLinearLayerWithLoRA")
            for layer in manager.modules.values():
                stacked = layer if isinstance(layer, linear) else None
                layer.set_mapping(CpuPunica(layer.punica_wrapper, step.cpu, stacked))
        wrappers[name] = StepPunica(shared, step)
        return step

    # -- tenants ---------------------------------------------------------------------------------

    def check_identity(self, request: Any) -> None:
        """Errors: AdapterRejectedError for in-place reloads and for an id that changes meaning."""
        if request.load_inplace:
            raise AdapterRejectedError(
                f"adapter {request.lora_name!r}: load_inplace is rejected (its prefix-cache blocks "
                "would be stale); load the changed adapter under a new name, such as "
                f"'{request.lora_name}@2'."
            )
        known = self.tenants.get(request.lora_int_id)
        if known is not None and (known.name, known.path) != (
            request.lora_name,
            request.lora_path,
        ):
            raise AdapterRejectedError(
                f"adapter id {request.lora_int_id} is {known.name!r} from {known.path}, requested "
                f"as {request.lora_name!r} from {request.lora_path}; use a new id."
            )

    def register(self, request: Any) -> None:
        """Validate a tenant without loading it; from here on only its staged copy is read.

        Errors: FormatError, FamilyMismatchError, BoundsError, AdapterRejectedError.
        """
        self.check_identity(request)
        if request.lora_int_id not in self.tenants:
            tenant = self.prefetcher.tenant(request)
            self._check_unchanged(tenant)
            self.tenants[request.lora_int_id] = tenant

    def _check_unchanged(self, tenant: Tenant) -> None:
        """Errors: AdapterRejectedError if the prefix cache may hold blocks of other content.

        vLLM keys cached blocks by (name, path): the same key with other weights or coefficients
        would hit stale blocks. The staged copy is removed then.
        """
        key = (tenant.name, tenant.path)
        loaded = self._loaded_content.setdefault(key, tenant.content)
        if loaded != tenant.content and self.prefix_cache:
            self.staging.drop(tenant.staged)
            raise AdapterRejectedError(
                f"tenant {tenant.name!r} at {tenant.path} has changed since it was first loaded; "
                "its cached prefixes would be stale. Load it under a new name or path (such as "
                f"'{tenant.name}@2'), or restart with --no-enable-prefix-caching."
            )

    def load(self, request: Any) -> Any:
        """Return a tenant as vLLM's LoRAModel, from its staged copy; validates it if needed.

        Errors: FormatError, FamilyMismatchError, BoundsError, AdapterRejectedError.
        """
        self.register(request)
        tenant = self.tenants[request.lora_int_id]
        if (shared := self._loaded_model(tenant)) is not None:
            self._adapter_bytes[request.lora_int_id] = self._adapter_bytes[shared.id]
            return compat.resolve("LoRAModel")(request.lora_int_id, shared.rank, dict(shared.loras))
        adapter = self.prefetcher.adapter(tenant)
        if self.settings.apply == "composed" and tenant.profile is not None:
            assert self.family is not None
            adapter = compose_adapter(adapter, self.family, tenant.profile)
        return self._lora_model(request.lora_int_id, adapter)

    def _with_same_weights(self, weights: str) -> Tenant | None:
        """Return a validated tenant with the same adapter, whatever its name and profile."""
        return next((t for t in list(self.tenants.values()) if t.weights == weights), None)

    def _loaded_model(self, tenant: Tenant) -> Any | None:
        """Return the LoRAModel of another revision with the same adapter, if it is in memory.

        vLLM packs a LoRAModel in place; packing it again changes nothing. Composed adapters carry
        the profile in their weights, so they are not shared.
        """
        if tenant.weights is None or self.settings.apply == "composed":
            return None
        loaded = self.manager.list_adapters()
        same = (i for i, t in self.tenants.items() if t.weights == tenant.weights and i in loaded)
        number = next(same, None)
        return None if number is None else loaded[number]

    def _lora_model(self, lora_int_id: int, adapter: Adapter | None) -> Any:
        """Build vLLM's LoRAModel, with the scaling folded into B.

        A LoRAModel must have weights, so a profile alone gets one module of zeros.
        """
        weights: dict[str, Any] = {}
        rank = 1
        lora_weights = adapter.lora_weights if adapter is not None else self._zero_lora()
        for site, lora in lora_weights.items():
            module = self.modules.find(site)
            assert module is not None
            for name, part in self.modules.unpacked(module, lora.folded()).items():
                weights[name] = compat.resolve("LoRALayerWeights")(
                    name,
                    part.rank,
                    part.rank,
                    part.a.to(self.lora_dtype),
                    part.b.to(self.lora_dtype),
                    1,
                )
            rank = max(rank, lora.rank)
        size = sum(w.lora_a.nbytes + w.lora_b.nbytes for w in weights.values())
        self._adapter_bytes[lora_int_id] = size
        return compat.resolve("LoRAModel")(lora_int_id, rank, weights)

    def _zero_lora(self) -> dict[str, LoRAWeights]:
        """Return zeros of rank 1 for the first site of the vector."""
        assert self.family is not None
        site, lora = next(iter(self.family.lora_weights.items()))
        return {site: LoRAWeights(torch.zeros(1, lora.d_in), torch.zeros(lora.d_out, 1))}

    def forget(self, lora_int_id: int) -> None:
        """Drop a removed adapter's staged copy and its prefetches."""
        self.prefetcher.forget(lora_int_id)
        self._adapter_bytes.pop(lora_int_id, None)
        tenant = self.tenants.pop(lora_int_id, None)
        if tenant is not None:
            self.staging.drop(tenant.staged)

    def on_eviction(self, lora_int_id: int) -> None:
        """Count an adapter that took an occupied slot; vLLM's dummy adapters do not count."""
        self.evictions += lora_int_id not in self.dummies

    def on_activation(self, lora_int_id: int, slot: int) -> None:
        """Write the gain row of the slot that an adapter has entered, and read it back.

        Errors: ReceiptError if the adapter was not validated or the device holds another row.
        """
        table = self.step.table
        if table is None:
            return
        coefficients = [0.0] * table.rows.shape[1]
        if lora_int_id not in self.dummies:
            tenant = self.tenants.get(lora_int_id)
            if tenant is None:
                raise ReceiptError(
                    f"adapter id {lora_int_id} entered slot {slot} without having been validated."
                )
            if tenant.profile is not None:
                coefficients = list(tenant.profile.coefficients)
        with compat.resolve("gpu_sync_allowed")():
            self.step.write_gains(slot, coefficients)
            if gain_digest(table.read(slot)) != gain_digest(coefficients):
                raise ReceiptError(
                    f"slot {slot} does not hold the gain row of adapter id {lora_int_id} that was "
                    "written to it."
                )

    # -- receipts --------------------------------------------------------------------------------

    def receipt(self, rank: int, world_size: int, only: int | None = None) -> Receipt:
        """Report what this worker has applied, with gain rows read back from the device.

        With `only`, adapters are limited to that id: a receipt of a thousand tenants is large.
        """
        slots = {i: s for s, i in enumerate(self.manager.lora_index_to_id) if i is not None}
        adapters = tuple(
            self._adapter_receipt(i, t, slots.get(i))
            for i, t in sorted(self.tenants.items())
            if only is None or i == only
        )
        table, base = self.step.table, self.plan.base_profile
        sites = 0 if self.plan.header is None else len(self.plan.header.sites)
        return Receipt(
            rank=rank,
            world_size=world_size,
            apply=str(self.settings.apply),
            family=None if self.family is None else self.family.digest,
            sites_expected=sites,
            sites_applied=0 if self.family is None else len(self.family.lora_weights),
            vector_bytes=self.vector.bytes,
            base_profile=None if base is None else base.digest,
            base_gain_digest=None if table is None else gain_digest(table.read(-1)),
            unprotected_mode=self.settings.missing_profile == "serve_unprotected",
            vllm_version=compat.version(),
            adapters=adapters,
            load_s=self._load_s,
            notes=self.vector.notes,
            adapter_bytes=self._loaded_bytes(),
            slots_total=len(self.manager.lora_index_to_id),
            slots_used=len(slots),
            slot_evictions=self.evictions,
        )

    def _loaded_bytes(self) -> int:
        """Return the bytes of the loaded adapters; revisions that share one count once."""
        loaded = self.manager.list_adapters()
        own = self.settings.apply == "composed"
        sizes = {
            number if own or tenant.weights is None else tenant.weights: self._adapter_bytes.get(
                number, 0
            )
            for number, tenant in self.tenants.items()
            if number in loaded
        }
        return sum(sizes.values())

    def _adapter_receipt(
        self, lora_int_id: int, tenant: Tenant, slot: int | None
    ) -> AdapterReceipt:
        row = list(tenant.profile.coefficients) if tenant.profile is not None else []
        if self.step.table is not None and slot is not None:
            row = self.step.table.read(slot)
        return AdapterReceipt(
            name=tenant.name,
            lora_int_id=lora_int_id,
            slot=slot,
            profile=None if tenant.profile is None else tenant.profile.digest,
            gain_digest=gain_digest(row) if row else None,
            tenant_sites=tenant.sites,
            safety_sites=sum(self._sites_by_layer[n] for n, value in enumerate(row) if value),
            gain_norm=math.hypot(*row),
        )
