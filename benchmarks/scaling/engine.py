"""What many tenants cost one engine: to read an adapter, and to report all of them.

The engine's loop does nothing else meanwhile. No engine runs: both are the worker's own code on its
own records. Seconds are the processor's, so that a busy machine does not matter.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from safegene_vllm.formats.adapter import Adapter, LoRAWeights, layer_of, load_adapter, save_adapter
from safegene_vllm.formats.family import FamilyHeader
from safegene_vllm.formats.profile import make_profile
from safegene_vllm.planner import ModelShape
from safegene_vllm.plugin.ops.gain_table import GainTable
from safegene_vllm.plugin.ops.step_state import StepState
from safegene_vllm.plugin.validation import Tenant
from safegene_vllm.plugin.worker_runtime import WorkerRuntime


@dataclass(frozen=True)
class Held:
    """With `tenants` in the engine: seconds of one receipt."""

    tenants: int
    receipt_s: float


@dataclass(frozen=True)
class Read:
    """One adapter of `bytes` read from the page cache and checked, as a worker does on a miss."""

    bytes: int
    seconds: float


def read_adapter(work: Path, shape: ModelShape, rank: int) -> Read:
    """An adapter of that rank on every site of the model, random, written and read five times."""
    make = torch.Generator().manual_seed(1)

    def lora(d_out: int, d_in: int) -> LoRAWeights:
        halves = (torch.randn(n, generator=make).bfloat16() for n in (rank * d_in, d_out * rank))
        a, b = halves
        return LoRAWeights(a.view(rank, d_in), b.view(d_out, rank))

    lora_weights = {
        f"model.layers.{layer}.{linear.name}.{site}": lora(width, linear.d_in)
        for layer in range(shape.layers)
        for linear in shape.linears
        for site, width in zip(linear.sites, linear.widths, strict=True)
    }
    save_adapter(Adapter(lora_weights, None, {}), work / "adapter", base_model=shape.name)
    seconds = []
    for _ in range(5):
        started = time.process_time()
        load_adapter(work / "adapter")
        seconds.append(time.process_time() - started)
    size = sum(p.a.nbytes + p.b.nbytes for p in lora_weights.values())
    return Read(size, statistics.median(seconds))


def measure(header: FamilyHeader, counts: tuple[int, ...], slots: int) -> list[Held]:
    """A worker's own receipt with each of `counts` tenants admitted, `slots` of them on the device.

    The worker's code on its own records, without a model: that is all a receipt reads.
    """
    runtime: Any = WorkerRuntime.__new__(WorkerRuntime)
    runtime.plan = SimpleNamespace(header=header, base_profile=None)
    runtime.settings = SimpleNamespace(apply="gain", missing_profile="refuse")
    runtime.family = SimpleNamespace(digest=header.digest, lora_weights=header.sites)
    runtime.vector = SimpleNamespace(bytes=0, notes=())
    runtime._load_s = 0.0
    runtime.step = StepState(GainTable(slots, header.num_layers, 64, "cpu"))
    runtime.manager = SimpleNamespace(lora_index_to_id=list(range(slots)), list_adapters=dict)
    runtime._adapter_bytes, runtime.evictions = {}, 0
    runtime._sites_by_layer = Counter(layer_of(site) for site in header.sites)
    runtime.tenants, found = {}, []
    for count in sorted(counts):
        for number in range(len(runtime.tenants), count):
            row = [0.5 + 0.001 * ((number + k) % 97) for k in range(header.num_layers)]
            name, place = f"tenant-{number:05d}@1", Path("/tenant")
            profile = make_profile(header, row, {"method": "scaling"})
            runtime.tenants[number] = Tenant(name, str(place), place, profile, 196, name, name)
        runtime.receipt(0, 1)
        seconds = []
        for _ in range(3):
            started = time.process_time()
            answer = runtime.receipt(0, 1).to_dict()
            seconds.append(time.process_time() - started)
            assert len(answer["adapters"]) == count
        found.append(Held(count, statistics.median(seconds)))
    return found
