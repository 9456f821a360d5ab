"""The fused GPU product: whether an engine's layers may use it, and its place in the host.

For CUDA devices; the kernels themselves are safegene_vllm/kernels. Where they cannot be used the
plain product (gain.GainPunica) is, and the receipt says why. Not for CPU: segment.py. MetadataPunica,
by which every product hears of the host's steps, is here for it needs this one's by name.
"""

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


class BatchMetadataUpdater(BatchMetadata):
    """The token plan as a listener of the host's steps."""

    def begin(self, mapping: Any) -> None:
        """mapping is the host's LoRAMapping: one adapter id per token, 0 for none, on the CPU."""
        self.set_idle(not any(mapping.index_mapping))


class MetadataPunica(PunicaProxy):
    """The host's punica wrapper, telling the gain table and the CPU product of every new step."""

    def __init__(self, inner: Any, listeners: list[Any]) -> None:
        super().__init__(inner)
        self.listeners = listeners

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        self.inner.update_metadata(*args, **kwargs)
        for listener in self.listeners:
            if isinstance(listener, BatchMetadataUpdater):
                listener.begin(kwargs["mapping"] if "mapping" in kwargs else args[0])
            listener.set_tokens(self.inner.token_lora_indices)


class TritonPunica(PunicaProxy):
    """A layer's punica wrapper whose LoRA product carries the safety product in its launches.

    One per layer with a vector, given to it with `set_mapping`; everything else goes to the host.
    """

    def __init__(self, inner: Any, site: LayerWeights, plan: BatchMetadata) -> None:
        from safegene_vllm.plugin.ops.triton_ops import add_product

        super().__init__(inner)
        self.site = site
        self.plan = plan
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
        """The host's contract: y (T, D_out) is changed in place.

        Errors: VllmCompatibilityError where y is to be overwritten (dual stream, which is refused at start).
        """
        if not add_inputs:
            raise VllmCompatibilityError(
                "the host asks for a LoRA product that is not added to the output."
            )
        self._add(
            y.view(-1, y.shape[-1]),
            x.reshape(-1, x.shape[-1]),
            lora_a_stacked,
            lora_b_stacked,
            self.site,
            self.plan,
            scale,
        )


def safety_lora(
    parts: Sequence[LoRAWeights | None], widths: Sequence[int], *, dtype: torch.dtype, device: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer's vector as the kernels read it: A (n R', D_in) and B (sum widths, R').

    R' is the largest rank of its parts; smaller ones and missing parts are filled with zeros.
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


def choose(
    setting: str,
    device: torch.device,
    dtype: torch.dtype,
    layers: Mapping[str, tuple[Any, Sequence[LoRAWeights | None]]],
    check: Callable[..., str | None] | None = None,
) -> tuple[set[str], tuple[str, ...]]:
    """The layers that use the kernels, of those with a vector (name: layer, its pairs by part).

    `setting` is auto (use them where they prove right), triton (use them, or do not start) or torch
    (never). Returns the names, and notes for the receipt wherever that is not all of them.

    Errors: VllmCompatibilityError naming what is in the way, if the setting is triton.
    """
    reasons: list[str] = []
    fused: dict[str, tuple[Any, Sequence[LoRAWeights | None]]] = {}
    if setting == "torch":
        reasons.append("safegene.kernels = 'torch'")
    elif device.type != "cuda":
        if setting == "auto":
            return set(), ()
        reasons.append(f"this is a {device.type} device, the kernels need CUDA")
    elif importlib.util.find_spec("triton") is None:
        reasons.append("Triton is not installed")
    else:
        faults = {name: _unsupported(layer, dtype) for name, (layer, _) in layers.items()}
        reasons += [f"{name}: {fault}" for name, fault in faults.items() if fault]
        fused = {name: layers[name] for name, fault in faults.items() if not fault}
        fault = None if not fused else _check(fused, device, dtype, check)
        if fault is not None:
            fused = {}
            reasons.append(f"the kernels disagree with the reference on this device: {fault}")
    if reasons and setting == "triton":
        raise VllmCompatibilityError(
            "safegene.kernels = 'triton' cannot be honoured: " + "; ".join(reasons[:5]) + ". Use "
            "'auto' to serve with the plain product where the kernels cannot be used."
        )
    if not reasons:
        return set(fused), ()
    note = f"gain table without kernels on {len(layers) - len(fused)} of {len(layers)} layers: "
    note += "; ".join(reasons[:5])
    if setting == "auto":
        logger.warning("%s", note)
    return set(fused), (note,)


def _unsupported(layer: Any, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot compute this layer's product; None where they can."""
    from safegene_vllm.plugin.ops.triton_ops import MAX_PARTS

    stacked = (*layer.lora_a_stacked, *layer.lora_b_stacked)
    if len(layer.lora_a_stacked) > MAX_PARTS:
        return f"{len(layer.lora_a_stacked)} parts, at most {MAX_PARTS} are supported"
    if {t.dtype for t in stacked} != {dtype}:
        return f"adapters in {stacked[0].dtype} on a model in {dtype}"
    if not all(t.is_contiguous() for t in stacked):
        return "adapters that are not contiguous in memory"
    return None


def _check(
    layers: Mapping[str, tuple[Any, Sequence[LoRAWeights | None]]],
    device: torch.device,
    dtype: torch.dtype,
    check: Callable[..., str | None] | None,
) -> str | None:
    if check is None:
        from safegene_vllm.plugin.ops.self_test import check as ours

        check = ours
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
