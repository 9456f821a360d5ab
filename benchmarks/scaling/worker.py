"""Cost of tenants for a worker, in CPU seconds of its own code on its own records.

Its engine does nothing else meanwhile.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from safegene_vllm.formats.adapter import Adapter, layer_of, load_adapter, save_adapter
from safegene_vllm.formats.family import FamilyHeader
from safegene_vllm.formats.profile import make_profile
from safegene_vllm.planner import ModelShape
from safegene_vllm.plugin.ops.gain_table import GainTable
from safegene_vllm.plugin.ops.step_state import StepState
from safegene_vllm.plugin.validation import Tenant
from safegene_vllm.plugin.worker_runtime import WorkerRuntime
from safegene_vllm.tiny_model import random_lora_weights


def read_adapter_s(work: Path, shape: ModelShape, rank: int) -> float:
    """Seconds to read and check an adapter on all modules, from the page cache, as on a miss."""
    shapes = {
        f"model.layers.{layer}.{linear.name}.{site}": (width, linear.d_in)
        for layer in range(shape.layers)
        for linear in shape.linears
        for site, width in zip(linear.sites, linear.widths, strict=True)
    }
    lora_weights = random_lora_weights(shapes, rank, 1)
    adapter = Adapter(lora_weights, None, {})
    save_adapter(adapter, work / "adapter", base_model=shape.name, dtype=torch.bfloat16)
    seconds = []
    for _ in range(5):
        started = time.process_time()
        load_adapter(work / "adapter")
        seconds.append(time.process_time() - started)
    return statistics.median(seconds)


def receipts_s(header: FamilyHeader, counts: tuple[int, ...], slots: int) -> dict[int, float]:
    """Seconds of a worker's receipt with each of `counts` tenants, `slots` of them on the device.

    Runs the worker's code on its own records, without a model: a receipt reads nothing else.
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
    runtime.tenants, found = {}, dict[int, float]()
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
            receipt = runtime.receipt(0, 1).to_dict()
            seconds.append(time.process_time() - started)
            assert len(receipt["adapters"]) == count
        found[count] = statistics.median(seconds)
    return found
