"""Placement of the safety vector in the LoRA layers of one worker, one copy per worker."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from safegene_vllm.errors import VllmCompatibilityError
from safegene_vllm.formats.adapter import LoRAWeights, layer_of
from safegene_vllm.plugin.ops.batch_metadata import BatchMetadata
from safegene_vllm.plugin.ops.cpu_lora import CpuPunica
from safegene_vllm.plugin.ops.gain_table import GainPunica
from safegene_vllm.plugin.ops.layer_weights import LayerWeights
from safegene_vllm.plugin.ops.step_state import StepState
from safegene_vllm.plugin.ops.triton_lora import TritonPunica, choose_layers, safety_lora
from safegene_vllm.plugin.target_modules import (
    EngineShape,
    TargetModuleMap,
    local_parts,
    stack_parts,
)


@dataclass(frozen=True)
class ResidentVector:
    """Summary of a placed vector: bytes on this worker, layers with kernels, notes for receipts."""

    bytes: int = 0
    kernel_layers: int = 0
    layers: int = 0
    notes: tuple[str, ...] = ()


def check_vector(engine: EngineShape, lora_weights: Mapping[str, LoRAWeights]) -> None:
    """Errors: VllmCompatibilityError for sites without a LoRA layer or of another shape."""
    problems = engine.mismatches(lora_weights)
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise VllmCompatibilityError(
            "the vector does not fit this engine: " + "; ".join(problems[:5]) + more
        )


def place_vector(
    lora_weights: Mapping[str, LoRAWeights],
    manager: Any,
    modules: TargetModuleMap,
    step: StepState,
    *,
    kernels: str,
    dtype: torch.dtype,
    device: torch.device,
) -> ResidentVector:
    """Give each layer with a vector a punica wrapper that adds it; called before any forward pass.

    All sites must have been found by `modules`; `step` has a gain table. The weights are cut to
    this rank and stored in `dtype` on `device`. `kernels` is the setting of that name.

    Errors: VllmCompatibilityError (see choose_layers).
    """
    table = step.table
    assert table is not None
    by_layer: dict[str, dict[int | None, LoRAWeights]] = defaultdict(dict)
    numbers: dict[str, int] = {}
    for site, lora in lora_weights.items():
        module, number = modules.find(site), layer_of(site)
        assert module is not None and number is not None
        by_layer[module.layer_name][module.part] = lora
        numbers[module.layer_name] = number
    layers = {
        name: (manager.modules[name], local_parts(manager.modules[name], parts))
        for name, parts in by_layer.items()
    }
    chosen, notes = choose_layers(kernels, device, dtype, layers)
    if chosen:
        step.triton = BatchMetadata(manager.lora_slots, table.max_tokens, device)
    step.reads_token_gains = len(chosen) < len(layers)
    total_bytes = 0
    for name, (layer, parts) in layers.items():
        number, inner = numbers[name], layer.punica_wrapper
        if name in chosen and step.triton is not None:
            a, b = safety_lora(parts, layer.output_slices, dtype=dtype, device=device)
            weights = LayerWeights(a, b, table.rows, number, table.base[number])
            layer.set_mapping(TritonPunica(inner, weights, step.triton))
            total_bytes += a.nbytes + b.nbytes
        elif isinstance(inner, CpuPunica):
            total_bytes += inner.set_vector(parts, table, number)
        else:
            a, bt = stack_parts(parts, tuple(layer.output_slices), dtype=dtype, device=device)
            layer.set_mapping(GainPunica(inner, a, bt, table.token_gains[number]))
            total_bytes += a.nbytes + bt.nbytes
    return ResidentVector(total_bytes, len(chosen), len(layers), notes)
