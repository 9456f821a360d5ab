"""One worker's side of SafeGene on LoRA slots: the vector, the admitted tenants, their gain rows.

For validating a tenant before it can be served, building the host's form of its adapter, writing
its gain row when it enters a slot, and saying in a receipt what was really applied. Not for hooking
into the host: manager.py does that and calls in here.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
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
from safegene_vllm.plugin.ops.gain_table import GainPunica, GainTable
from safegene_vllm.plugin.ops.layer_weights import LayerWeights
from safegene_vllm.plugin.ops.triton_lora import (
    BatchMetadataUpdater,
    MetadataPunica,
    TritonPunica,
    choose,
    safety_lora,
)
from safegene_vllm.plugin.preflight import EnginePlan
from safegene_vllm.plugin.staging import Staging
from safegene_vllm.plugin.target_modules import TargetModuleMap, local_parts, stack_parts
from safegene_vllm.plugin.validation import Tenant, check_unchanged, validate_adapter
from safegene_vllm.settings import KEY


@dataclass
class _Resident:
    """The vector as this worker carries it."""

    sites: int = 0
    bytes: int = 0
    load_s: float = 0.0


class WorkerRuntime:
    """State of one worker; `attach` once, then `load`, `activated` and `receipt` as they come."""

    def __init__(self, plan: EnginePlan, vllm_config: Any, device: torch.device) -> None:
        self.plan = plan
        self.settings = plan.settings
        self.device = device
        self.dtype = vllm_config.model_config.dtype
        self.max_rank = vllm_config.lora_config.max_lora_rank
        self.lora_dtype = vllm_config.lora_config.lora_dtype
        self.prefix_cache = bool(vllm_config.cache_config.enable_prefix_caching)
        self.staging = Staging(plan.settings.staging_dir)
        self.tenants: dict[int, Tenant] = {}
        self.seen: dict[tuple[str, str], str] = {}
        self.arrivals = AdapterPrefetcher(
            lambda request: validate_adapter(request, self), self.staging.drop
        )
        self.dummies: set[int] = set()
        self.bytes: dict[int, int] = {}
        self.evictions = 0
        self.family = None if plan.header is None else load_family(plan.settings.family or Path())
        sites = () if plan.header is None else plan.header.sites
        self._sites_of = Counter(layer_of(site) for site in sites)
        self.resident = _Resident()
        self.notes: tuple[str, ...] = ()
        self.listeners: list[Any] = []
        self._config = vllm_config
        self.table: GainTable | None = None
        self.sites: TargetModuleMap
        self.manager: Any = None

    # -- the vector ------------------------------------------------------------------------------

    def attach(self, manager: Any) -> None:
        """Give every LoRA layer what it needs and place the vector; called before any forward pass.

        Errors: VllmCompatibilityError naming the sites of the vector that this engine has no LoRA layer for.
        """
        started = time.perf_counter()
        self.manager = manager
        self.sites = TargetModuleMap(manager)
        self._attach_products(manager)
        if self.family is not None:
            self._find_all(self.family.lora_weights)
            if self.table is not None:
                self._place(self.family.lora_weights, self.table)
                if self.plan.base_profile is not None:
                    self.table.write(-1, self.plan.base_profile.coefficients)
            self.resident.sites = len(self.family.lora_weights)
        self.resident.load_s = time.perf_counter() - started

    def _attach_products(self, manager: Any) -> None:
        """The gain table, the CPU product, and what listens to the host's steps."""
        wrappers = manager.punica_wrapper_mapping
        tokens = max(w._token_lora_indices.shape[0] for w in wrappers.values())
        if self.family is not None and self.settings.apply == "gain":
            layers = self.family.header.base.num_layers
            self.table = GainTable(manager.lora_slots, layers, tokens, self.device)
        if self.device.type == "cpu":
            header = None if self.table is None else self.plan.header
            vector = 0 if header is None else header.max_rank
            size = (manager.lora_slots, self.max_rank, tokens)
            step = CpuBatchMetadata(*size, dtype=self.lora_dtype, vector=vector, table=self.table)
            self.listeners.append(step)
            linear = compat.resolve("BaseLinearLayerWithLoRA")
            for layer in manager.modules.values():
                slots = layer if isinstance(layer, linear) else None
                layer.set_mapping(CpuPunica(layer.punica_wrapper, step, slots))
        if len(wrappers) != 1:
            raise VllmCompatibilityError(
                f"found {len(wrappers)} LoRA wrappers ({', '.join(wrappers)}); SafeGene supports "
                "language models without tower or connector LoRA."
            )
        for name, wrapper in wrappers.items():
            wrappers[name] = MetadataPunica(wrapper, self.listeners)

    def _find_all(self, lora_weights: Mapping[str, LoRAWeights]) -> None:
        """Errors: VllmCompatibilityError for sites without a LoRA layer or of another shape."""
        faults = self.site_faults(lora_weights)
        if faults:
            raise VllmCompatibilityError(
                "the vector does not fit this engine: " + "; ".join(faults[:5]) + _more(faults)
            )

    def site_faults(self, lora_weights: Mapping[str, LoRAWeights]) -> list[str]:
        """One line per site that this engine cannot apply."""
        faults = []
        for site, lora in lora_weights.items():
            place = self.sites.find(site)
            if place is None:
                faults.append(
                    f"{site} has no LoRA layer here (is it in --lora-target-modules? "
                    "embeddings and lm_head are not supported)"
                )
                continue
            shape = self.sites.global_shape(place)
            if shape is not None and shape != (lora.d_out, lora.d_in):
                faults.append(f"{site} is {shape} here, {(lora.d_out, lora.d_in)} in the file")
            if not all(lora.fits(dtype) for dtype in {self.dtype, self.lora_dtype}):
                faults.append(
                    f"{site} overflows {self.lora_dtype} with its scaling {lora.scaling:g}"
                )
        return faults

    def _place(self, lora_weights: Mapping[str, LoRAWeights], table: GainTable) -> None:
        """Put the vector beside its LoRA layers, cut to this rank, one stacked pair per layer."""
        grouped: dict[str, dict[int | None, LoRAWeights]] = defaultdict(dict)
        numbers: dict[str, int] = {}
        for site, lora in lora_weights.items():
            place = self.sites.find(site)
            number = layer_of(site)
            assert place is not None and number is not None
            grouped[place.layer_name][place.part] = lora
            numbers[place.layer_name] = number
        modules = self.manager.modules
        found = {
            name: (modules[name], local_parts(modules[name], p)) for name, p in grouped.items()
        }
        fused = self._choose(found)
        step = (
            BatchMetadataUpdater(self.manager.lora_slots, table.tokens, self.device)
            if fused
            else None
        )
        self.listeners += [table] if len(fused) < len(found) else []
        self.listeners += [] if step is None else [step]
        for name, (layer, local) in found.items():
            number, inner = numbers[name], layer.punica_wrapper
            where = {"dtype": self.dtype, "device": self.device}
            if name in fused and step is not None:
                a, b = safety_lora(local, layer.output_slices, **where)
                share = LayerWeights(a, b, table.rows, number, table.base[number])
                layer.set_mapping(TritonPunica(inner, share, step))
                size = a.nbytes + b.nbytes
            elif isinstance(inner, CpuPunica):
                size = inner.place(local, table, number)
            else:
                a, bt = stack_parts(local, tuple(layer.output_slices), **where)
                layer.set_mapping(GainPunica(inner, a, bt, table.token_gains[number]))
                size = a.nbytes + bt.nbytes
            self.resident.bytes += size

    def _choose(self, layers: Mapping[str, tuple[Any, list[LoRAWeights | None]]]) -> set[str]:
        """The layers that use the GPU kernels; says so where vLLM's compile cache will see it."""
        setting = self.settings.kernels
        fused, self.notes = choose(setting, self.device, self.dtype, layers)
        if self.device.type == "cuda":
            raw = dict(self._config.additional_config[KEY])
            raw["kernels_used"] = f"{len(fused)} of {len(layers)} layers"
            self._config.additional_config[KEY] = raw
        return fused

    # -- tenants ---------------------------------------------------------------------------------

    def check_identity(self, request: Any) -> None:
        """Errors: AdapterRejectedError for in-place reloads and for an id that changes meaning."""
        if request.load_inplace:
            raise AdapterRejectedError(
                f"adapter {request.lora_name!r}: load_inplace is refused (its prefix-cache blocks "
                "would be stale); load the changed adapter under a new name, such as "
                f"'{request.lora_name}@2'."
            )
        known = self.tenants.get(request.lora_int_id)
        if known is not None and (known.name, known.path) != (
            request.lora_name,
            request.lora_path,
        ):
            raise AdapterRejectedError(
                f"adapter id {request.lora_int_id} is {known.name!r} from {known.path}, asked for "
                f"as {request.lora_name!r} from {request.lora_path}; use a new id."
            )

    def admit(self, request: Any) -> None:
        """Let a tenant in without loading it: from here on only its staged copy is read.

        Errors: FormatError, FamilyMismatchError, BoundsError, AdapterRejectedError.
        """
        self.check_identity(request)
        if request.lora_int_id not in self.tenants:
            tenant = self.arrivals.tenant(request)
            check_unchanged(tenant, self)
            self.tenants[request.lora_int_id] = tenant

    def load(self, request: Any) -> Any:
        """The host's form of a tenant, from its staged copy; validated on the first call.

        Errors: FormatError, FamilyMismatchError, BoundsError, AdapterRejectedError.
        """
        self.admit(request)
        tenant = self.tenants[request.lora_int_id]
        if (shared := self._resident_model(tenant)) is not None:
            self.bytes[request.lora_int_id] = self.bytes[shared.id]
            return compat.resolve("LoRAModel")(request.lora_int_id, shared.rank, dict(shared.loras))
        adapter = self.arrivals.adapter(tenant)
        if self.settings.apply == "composed" and tenant.profile is not None:
            assert self.family is not None
            adapter = compose_adapter(adapter, self.family, tenant.profile)
        return self._host_model(request.lora_int_id, adapter)

    def twin(self, weights: str) -> Tenant | None:
        """An admitted tenant with the same adapter, whatever its name and profile."""
        return next((t for t in list(self.tenants.values()) if t.weights == weights), None)

    def _resident_model(self, tenant: Tenant) -> Any | None:
        """The host's form of the same adapter where another revision has it in memory.

        The host has packed it in place already; packing again finds nothing left to pack. Composed
        slots carry the profile in their weights, so nothing is shared there.
        """
        if tenant.weights is None or self.settings.apply == "composed":
            return None
        loaded = self.manager.list_adapters()
        same = (i for i, t in self.tenants.items() if t.weights == tenant.weights and i in loaded)
        number = next(same, None)
        return None if number is None else loaded[number]

    def _host_model(self, lora_int_id: int, adapter: Adapter | None) -> Any:
        """A LoRAModel whose pairs carry their scaling in B.

        The host cannot hold a model without pairs, so a profile alone becomes one pair of zeros.
        """
        weights: dict[str, Any] = {}
        rank = 1
        lora_weights = adapter.lora_weights if adapter is not None else self._zero_lora()
        for site, lora in lora_weights.items():
            place = self.sites.find(site)
            assert place is not None
            for name, part in self.sites.parts(place, lora.folded()).items():
                weights[name] = compat.resolve("LoRALayerWeights")(
                    name,
                    part.rank,
                    part.rank,
                    part.a.to(self.lora_dtype),
                    part.b.to(self.lora_dtype),
                    1,
                )
            rank = max(rank, lora.rank)
        self.bytes[lora_int_id] = sum(w.lora_a.nbytes + w.lora_b.nbytes for w in weights.values())
        return compat.resolve("LoRAModel")(lora_int_id, rank, weights)

    def _zero_lora(self) -> dict[str, LoRAWeights]:
        """One rank-1 pair of zeros, on the first site of the vector."""
        assert self.family is not None
        site, lora = next(iter(self.family.lora_weights.items()))
        return {site: LoRAWeights(torch.zeros(1, lora.d_in), torch.zeros(lora.d_out, 1))}

    def forget(self, lora_int_id: int) -> None:
        """Drop a removed adapter's staged copy, and what is on its way under its id."""
        self.arrivals.forget(lora_int_id)
        self.bytes.pop(lora_int_id, None)
        tenant = self.tenants.pop(lora_int_id, None)
        if tenant is not None:
            self.staging.drop(tenant.staged)

    def evicted(self, lora_int_id: int) -> None:
        """An adapter has taken a slot that another had; the host's own dummies do not count."""
        self.evictions += lora_int_id not in self.dummies

    def activated(self, lora_int_id: int, slot: int) -> None:
        """Write and read back the gain row of the slot an adapter has just entered.

        Errors: ReceiptError if the adapter was never admitted or the device holds another row.
        """
        if self.table is None:
            return
        coefficients = [0.0] * self.table.rows.shape[1]
        if lora_int_id not in self.dummies:
            tenant = self.tenants.get(lora_int_id)
            if tenant is None:
                raise ReceiptError(
                    f"adapter id {lora_int_id} entered slot {slot} without having been admitted."
                )
            if tenant.profile is not None:
                coefficients = list(tenant.profile.coefficients)
        with compat.resolve("gpu_sync_allowed")():
            self.table.write(slot, coefficients)
            if gain_digest(self.table.read(slot)) != gain_digest(coefficients):
                raise ReceiptError(
                    f"slot {slot} does not hold the gain row of adapter id {lora_int_id} that was "
                    "written to it."
                )

    # -- receipts --------------------------------------------------------------------------------

    def receipt(self, rank: int, world_size: int, only: int | None = None) -> Receipt:
        """What this worker has really applied, gain rows read back from the device.

        With `only`, of the adapters that one alone: a thousand are not told of for each newcomer.
        """
        slots = {i: s for s, i in enumerate(self.manager.lora_index_to_id) if i is not None}
        adapters = tuple(
            self._adapter_receipt(i, t, slots.get(i))
            for i, t in sorted(self.tenants.items())
            if only is None or i == only
        )
        base = self.plan.base_profile
        base_row = None if self.table is None else gain_digest(self.table.read(-1))
        return Receipt(
            rank=rank,
            world_size=world_size,
            apply=str(self.settings.apply),
            family=None if self.family is None else self.family.digest,
            sites_expected=0 if self.plan.header is None else len(self.plan.header.sites),
            sites_applied=self.resident.sites,
            vector_bytes=self.resident.bytes,
            base_profile=None if base is None else base.digest,
            base_gain_digest=base_row,
            unprotected_mode=self.settings.missing_profile == "serve_unprotected",
            vllm_version=compat.version(),
            adapters=adapters,
            load_s=self.resident.load_s,
            notes=self.notes,
            adapter_bytes=self._adapter_bytes(),
            slots_total=len(self.manager.lora_index_to_id),
            slots_used=len(slots),
            slot_evictions=self.evictions,
        )

    def _adapter_bytes(self) -> int:
        """What the loaded adapters take; revisions that share one count once."""
        loaded = self.manager.list_adapters()
        own = self.settings.apply == "composed"
        sizes = {
            number if own or tenant.weights is None else tenant.weights: self.bytes.get(number, 0)
            for number, tenant in self.tenants.items()
            if number in loaded
        }
        return sum(sizes.values())

    def _adapter_receipt(
        self, lora_int_id: int, tenant: Tenant, slot: int | None
    ) -> AdapterReceipt:
        row = list(tenant.profile.coefficients) if tenant.profile is not None else []
        if self.table is not None and slot is not None:
            row = self.table.read(slot)
        return AdapterReceipt(
            name=tenant.name,
            lora_int_id=lora_int_id,
            slot=slot,
            profile=None if tenant.profile is None else tenant.profile.digest,
            gain_digest=gain_digest(row) if row else None,
            tenant_sites=tenant.sites,
            safety_sites=sum(self._sites_of[n] for n, value in enumerate(row) if value != 0.0),
            gain_norm=math.hypot(*row),
        )


def _more(faults: list[str]) -> str:
    return f"; and {len(faults) - 5} more." if len(faults) > 5 else "."
