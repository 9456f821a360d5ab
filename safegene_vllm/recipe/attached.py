"""A safety vector on a running model by forward hooks: target module output plus λ_l · B·A·x.

LoRA weights or coefficients may be trained; the model's own weights never change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from safegene_vllm.formats.adapter import LoRAWeights, layer_of
from safegene_vllm.recipe.model import find_target_modules


class AttachedVector:
    """LoRA weights a (R, D_in), b (D_out, R) by target module, coefficients (L,), all float32.

    Semantics: y ← y + λ[layer of module] · ((x aᵀ) bᵀ), computed in y's dtype.
    """

    def __init__(
        self,
        lora_weights: Mapping[str, LoRAWeights],
        num_layers: int,
        device: torch.device | str = "cpu",
    ) -> None:
        # Copies, so that training never changes the caller's tensors.
        self.a = {
            s: p.a.detach().to(device, torch.float32, copy=True) for s, p in lora_weights.items()
        }
        self.b = {
            s: (p.b.detach().to(device, torch.float32) * p.scaling) for s, p in lora_weights.items()
        }
        self.coefficients = torch.ones(num_layers, device=device)

    def parameters(self) -> dict[str, torch.Tensor]:
        """The LoRA weights as trainable tensors, by `<site>.A` and `<site>.B`."""
        tensors = {f"{s}.A": t for s, t in self.a.items()} | {
            f"{s}.B": t for s, t in self.b.items()
        }
        return {name: tensors[name].requires_grad_() for name in sorted(tensors)}

    def lora_weights(self) -> dict[str, LoRAWeights]:
        """The current LoRA weights on the CPU, coefficients not applied."""
        return {
            s: LoRAWeights(self.a[s].detach().cpu().clone(), self.b[s].detach().cpu().clone())
            for s in self.a
        }

    @contextmanager
    def applied_to(self, model: Any) -> Iterator[None]:
        """Context manager: the vector is applied inside the block. Errors: SiteError."""
        handles = [
            module.register_forward_hook(self._hook(site))
            for site, module in find_target_modules(model, self.a, "the vector").items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, site: str) -> Callable[[Any, tuple[torch.Tensor, ...], torch.Tensor], Any]:
        layer = layer_of(site)
        assert layer is not None

        def add(_: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            dtype = output.dtype
            shrunk = torch.nn.functional.linear(inputs[0].to(dtype), self.a[site].to(dtype))
            scaled = shrunk * self.coefficients[layer].to(dtype)
            return output + torch.nn.functional.linear(scaled, self.b[site].to(dtype))

        return add


def init_lora_weights(
    shapes: Mapping[str, tuple[int, int]], rank: int, seed: int
) -> dict[str, LoRAWeights]:
    """LoRA weights to train: A uniform (Kaiming with a = √5), B zero. Shapes are (D_out, D_in).

    The vector is exactly zero at the start (Hu et al. 2021, arXiv:2106.09685).
    """
    generator = torch.Generator().manual_seed(seed)
    lora_weights = {}
    for site in sorted(shapes):
        d_out, d_in = shapes[site]
        bound = 1.0 / d_in**0.5
        a = (torch.rand(rank, d_in, generator=generator) * 2 - 1) * bound
        lora_weights[site] = LoRAWeights(a, torch.zeros(d_out, rank))
    return lora_weights
