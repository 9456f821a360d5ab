"""Target modules of adapters and vectors in the running model, as vLLM fused and sharded them.

Translates Hugging Face module names ("sites" in file formats) into vLLM's LoRA layers, and cuts
LoRA weights to this rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from safegene_vllm.formats.adapter import LoRAWeights
from safegene_vllm.plugin import compat


@dataclass(frozen=True)
class TargetModule:
    """Location of a site: vLLM's LoRA layer, and the packed part of it (None: the whole layer).

    `name` is vLLM's name of the unpacked module, `layer_name` that of the layer that holds it.
    """

    name: str
    layer_name: str
    part: int | None


class TargetModuleMap:
    """Target modules of one model, as its LoRA manager wrapped it."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        # vLLM's mapper also stacks (q_proj to qkv_proj); only its renames are wanted here.
        mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
        for unstacked in ("get_rename_mapper", "get_unstacked_mapper"):  # 0.32, 0.28
            if hasattr(mapper, unstacked):
                mapper = getattr(mapper, unstacked)()
                break
        self._mapper = mapper
        self._parts = {
            part: (name, index)
            for name, parts in manager.packed_modules.items()
            for index, part in enumerate(parts)
        }

    def find(self, site: str) -> TargetModule | None:
        """Return the location of `site`, or None if the engine has no LoRA layer there."""
        name, _ = compat.resolve("parse_fine_tuned_lora_name")(
            f"base_model.model.{site}.lora_A.weight", self._mapper
        )
        if name in self._parts:
            layer_name, part = self._parts[name]
            return TargetModule(name, layer_name, part)
        linear = compat.resolve("BaseLinearLayerWithLoRA")
        if isinstance(self._manager.modules.get(name), linear):
            return TargetModule(name, name, None)
        return None

    def unpacked(self, module: TargetModule, lora: LoRAWeights) -> dict[str, LoRAWeights]:
        """Return the LoRA weights under vLLM's unpacked names.

        Usually one entry. A module that is fused in the checkpoint (GLM-4's gate_up_proj) and has
        two parts in vLLM becomes two entries that share A; vLLM itself cannot load such an adapter.
        """
        layer = self._manager.modules[module.layer_name]
        names = self._manager.packed_modules.get(module.layer_name, [])
        if module.part is not None or len(layer.output_slices) != len(names):
            return {module.name: lora}
        return dict(zip(names, split_rows(layer, lora), strict=True))

    def global_shape(self, module: TargetModule) -> tuple[int, int] | None:
        """Return (D_out, D_in) over all ranks, or None where vLLM does not know it."""
        base = self._manager.modules[module.layer_name].base_layer
        d_in = int(base.input_size)
        if module.part is None:
            return int(base.output_size), d_in
        sizes = getattr(base, "output_sizes", None)
        return None if sizes is None else (int(sizes[module.part]), d_in)


@dataclass(frozen=True)
class EngineShape:
    """Limits for LoRA weights: target modules, maximum rank, dtypes of the model and the slots."""

    modules: TargetModuleMap
    max_rank: int
    dtypes: frozenset[torch.dtype]

    def mismatches(self, lora_weights: Mapping[str, LoRAWeights]) -> list[str]:
        """Return one line per site that this engine cannot apply."""
        problems = []
        for site, lora in lora_weights.items():
            module = self.modules.find(site)
            if module is None:
                problems.append(
                    f"{site} has no LoRA layer here (is it in --lora-target-modules? "
                    "embeddings and lm_head are not supported)"
                )
                continue
            shape = self.modules.global_shape(module)
            if shape is not None and shape != (lora.d_out, lora.d_in):
                problems.append(f"{site} is {shape} here, {(lora.d_out, lora.d_in)} in the file")
            for dtype in sorted(self.dtypes, key=str):
                if not lora.fits(dtype):
                    problems.append(f"{site} overflows {dtype} with its scaling {lora.scaling:g}")
        return problems


def split_rows(layer: Any, lora: LoRAWeights) -> list[LoRAWeights]:
    """Split LoRA weights of a fused layer by part: B's rows by the parts' global widths."""
    blocks = torch.split(lora.b, [int(n) for n in layer.base_layer.output_sizes])
    return [LoRAWeights(lora.a, block, lora.scaling) for block in blocks]


def local_parts(layer: Any, parts: Mapping[int | None, LoRAWeights]) -> list[LoRAWeights | None]:
    """Cut one layer's LoRA weights to this rank by the layer's own rule, in the layer's order.

    Shapes: in, A (R, D_in), B (D_out, R) over all ranks; out, A (R, d_in), B (d_out, R) of this
    rank. None for a part without LoRA weights.
    """
    if None in parts and len(layer.output_slices) > 1:
        parts = dict(enumerate(split_rows(layer, parts[None])))
    if None in parts:
        lora = parts[None]
        if layer.tp_size == 1:
            return [lora]
        return [LoRAWeights(layer.slice_lora_a(lora.a), layer.slice_lora_b(lora.b))]
    ordered = [parts.get(i) for i in range(len(layer.output_slices))]
    if layer.tp_size == 1:
        return ordered
    a = layer.slice_lora_a([None if p is None else p.a for p in ordered])
    b = layer.slice_lora_b([None if p is None else p.b for p in ordered])
    return [None if p is None else LoRAWeights(x, y) for p, x, y in zip(ordered, a, b, strict=True)]


def stack_parts(
    parts: list[LoRAWeights | None], widths: tuple[int, ...], *, dtype: torch.dtype, device: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack the parts of a packed layer into one A and Bᵀ, so that it costs two matrix products.

    Semantics: A = [A_0; A_1; ...] (sum R, D_in); Bᵀ (sum R, sum widths) holds B_iᵀ in the columns
    of part i and the rows of its rank, and zeros elsewhere.
    """
    if len(parts) == 1:
        widths = (sum(widths),)
    present = [p for p in parts if p is not None]
    a = torch.cat([p.a for p in present]).to(device=device, dtype=dtype).contiguous()
    bt = torch.zeros(a.shape[0], sum(widths), dtype=dtype, device=device)
    row = column = 0
    for lora, width in zip(parts, widths, strict=True):
        if lora is not None:
            rank = lora.b.shape[1]
            block = lora.b.t().to(device=device, dtype=dtype)
            bt[row : row + rank, column : column + width] = block
            row += rank
        column += width
    return a, bt
