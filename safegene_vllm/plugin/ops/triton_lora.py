"""LoRA product on CUDA with the vector in the same two launches, and the choice to use it."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from safegene_vllm.errors import VllmCompatibilityError
from safegene_vllm.formats.adapter import LoRAWeights
from safegene_vllm.plugin.ops.batch_metadata import BatchMetadata
from safegene_vllm.plugin.ops.layer_weights import LayerShape, LayerWeights
from safegene_vllm.plugin.ops.punica_proxy import PunicaProxy

logger = logging.getLogger("vllm.safegene")

Layers = Mapping[str, tuple[Any, Sequence[LoRAWeights | None]]]
"""Layers with a vector by name: vLLM's LoRA layer, and the vector's weights by part."""


class TritonPunica(PunicaProxy):
    """Punica wrapper of one layer with a vector: both products in the same launches."""

    def __init__(self, inner: Any, weights: LayerWeights, batch: BatchMetadata) -> None:
        # Triton is installed only where the kernels can run.
        from safegene_vllm.plugin.ops.triton_ops import add_product

        super().__init__(inner)
        self.weights = weights
        self.batch = batch
        self._add = add_product

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: Any,
        lora_b_stacked: Any,
        scale: float,
        output_slices: Any,
        *,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """Update y (T, D_out) in place, as vLLM's wrapper does.

        Errors: VllmCompatibilityError if y is to be overwritten (dual stream, rejected at start).
        """
        if not add_inputs:
            raise VllmCompatibilityError(
                "vLLM asks for a LoRA product that is not added to the output; unset "
                "VLLM_LORA_ENABLE_DUAL_STREAM."
            )
        self._add(
            y.view(-1, y.shape[-1]),
            x.reshape(-1, x.shape[-1]),
            lora_a_stacked,
            lora_b_stacked,
            self.weights,
            self.batch,
            scale,
        )


def safety_lora(
    parts: Sequence[LoRAWeights | None], widths: Sequence[int], *, dtype: torch.dtype, device: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack one layer's vector for the kernels: A (n R', D_in) and B (sum widths, R').

    R' is the largest rank of its parts; smaller and missing parts are filled with zeros.
    """
    present = [p for p in parts if p is not None]
    rank, d_in = max(p.rank for p in present), present[0].d_in
    a = torch.zeros(len(widths), rank, d_in, dtype=dtype, device=device)
    b = torch.zeros(sum(widths), rank, dtype=dtype, device=device)
    column = 0
    for i, (lora, width) in enumerate(zip(parts, widths, strict=True)):
        if lora is not None:
            a[i, : lora.rank] = lora.a
            b[column : column + width, : lora.rank] = lora.b
        column += width
    return a.flatten(0, 1), b


def choose_layers(
    setting: str,
    device: torch.device,
    dtype: torch.dtype,
    layers: Layers,
    check: Callable[..., str | None] | None = None,
) -> tuple[set[str], tuple[str, ...]]:
    """Choose the layers that use the kernels; return their names and notes for the receipt.

    `setting` is auto (use the kernels where they pass the self-test), triton (use them or do not
    start) or torch (never). There is a note wherever not all layers use them.

    Errors: VllmCompatibilityError listing the reasons, if the setting is triton.
    """
    reasons: list[str] = []
    chosen: Layers = {}
    if setting == "torch":
        reasons.append("safegene.kernels = 'torch'")
    elif device.type != "cuda":
        if setting == "auto":
            return set(), ()
        reasons.append(f"this is a {device.type} device, the kernels need CUDA")
    elif importlib.util.find_spec("triton") is None:
        reasons.append("Triton is not installed")
    else:
        unsupported = {name: _unsupported(layer, dtype) for name, (layer, _) in layers.items()}
        reasons += [f"{name}: {reason}" for name, reason in unsupported.items() if reason]
        chosen = {name: layers[name] for name, reason in unsupported.items() if not reason}
        failure = _self_test(chosen, device, dtype, check) if chosen else None
        if failure is not None:
            chosen = {}
            reasons.append(f"the kernels disagree with the reference on this device: {failure}")
    if reasons and setting == "triton":
        raise VllmCompatibilityError(
            "safegene.kernels = 'triton' cannot be honored: " + "; ".join(reasons[:5]) + ". Use "
            "'auto' to serve with the plain product where the kernels cannot be used."
        )
    if not reasons:
        return set(chosen), ()
    note = f"gain table without kernels on {len(layers) - len(chosen)} of {len(layers)} layers: "
    note += "; ".join(reasons[:5])
    if setting == "auto":
        logger.warning("%s", note)
    return set(chosen), (note,)


def _unsupported(layer: Any, dtype: torch.dtype) -> str | None:
    """Return why the kernels cannot compute this layer's product; None where they can."""
    from safegene_vllm.plugin.ops.triton_ops import MAX_PARTS

    stacked = (*layer.lora_a_stacked, *layer.lora_b_stacked)
    if len(layer.lora_a_stacked) > MAX_PARTS:
        return f"{len(layer.lora_a_stacked)} parts, at most {MAX_PARTS} are supported"
    if {t.dtype for t in stacked} != {dtype}:
        return f"adapters in {stacked[0].dtype} on a model in {dtype}"
    if not all(t.is_contiguous() for t in stacked):
        return "adapters that are not contiguous in memory"
    return None


def _self_test(
    layers: Layers,
    device: torch.device,
    dtype: torch.dtype,
    check: Callable[..., str | None] | None,
) -> str | None:
    if check is None:
        from safegene_vllm.plugin.ops import self_test  # needs Triton

        check = self_test.check
    shapes = [
        LayerShape(
            tuple(b.shape[2] for b in layer.lora_b_stacked),
            int(layer.lora_a_stacked[0].shape[3]),
            int(layer.lora_a_stacked[0].shape[2]),
            max(p.rank for p in parts if p is not None),
        )
        for layer, parts in layers.values()
    ]
    return check(shapes, dtype, device)
