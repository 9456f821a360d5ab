"""Finds a vector's or an adapter's sites in the running model, and cuts pairs to this rank.

For translating Hugging Face site names into the host's LoRA layers (fused and sharded as they
are). Not for computing with them.
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
    """Where a site lives: the host's LoRA layer, and which of its packed parts (None: all of it).

    `name` is the host's name of the unpacked site, `layer_name` that of the layer holding it.
    """

    name: str
    layer_name: str
    part: int | None


class TargetModuleMap:
    """Site names of one model, as its LoRA manager wrapped it."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        # The host's mapper also stacks (q_proj to qkv_proj); only its renames are wanted here.
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
        """The place of `site`, or None if the engine has no LoRA layer there."""
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

    def layer(self, place: TargetModule) -> Any:
        return self._manager.modules[place.layer_name]

    def parts(self, place: TargetModule, lora: LoRAWeights) -> dict[str, LoRAWeights]:
        """The pair under the host's unpacked names.

        Usually one; but a site that is fused in the checkpoint (GLM-4's gate_up_proj) and two-part
        in the host becomes two, sharing A. The host itself cannot load such an adapter.
        """
        layer = self.layer(place)
        names = self._manager.packed_modules.get(place.layer_name, [])
        if place.part is not None or len(layer.output_slices) != len(names):
            return {place.name: lora}
        return dict(zip(names, split_rows(layer, lora), strict=True))

    def global_shape(self, place: TargetModule) -> tuple[int, int] | None:
        """(D_out, D_in) over all ranks, or None where the host does not tell."""
        base = self.layer(place).base_layer
        d_in = int(base.input_size)
        if place.part is None:
            return int(base.output_size), d_in
        sizes = getattr(base, "output_sizes", None)
        return None if sizes is None else (int(sizes[place.part]), d_in)


def split_rows(layer: Any, lora: LoRAWeights) -> list[LoRAWeights]:
    """One pair over a fused weight as one pair per part: B's rows by the parts' global widths."""
    blocks = torch.split(lora.b, [int(n) for n in layer.base_layer.output_sizes])
    return [LoRAWeights(lora.a, block, lora.scaling) for block in blocks]


def local_parts(layer: Any, parts: Mapping[int | None, LoRAWeights]) -> list[LoRAWeights | None]:
    """The pairs of one layer, cut to this rank by the layer's own rule, in the layer's order.

    Shapes: in, A (R, D_in), B (D_out, R) over all ranks; out, A (R, d_in), B (d_out, R) of this
    rank. A part without a pair is None.
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
    """One pair for a whole packed layer, so that it costs two matrix products: A and Bᵀ.

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
