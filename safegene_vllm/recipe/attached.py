"""A safety vector on a running model: every site's output plus λ_l · B·A·x, by forward hooks.

The pairs or the coefficients may be trained; the model's own weights never change. The third of the
recipe's tools beside encoding and training; serving is the plugin's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from safegene_vllm.formats.adapter import LoRAWeights, layer_of
from safegene_vllm.recipe.model import site_modules


class Attached:
    """Pairs as float32 tensors a (R, D_in), b (D_out, R) by site; coefficients (L,) float32.

    Semantics: y ← y + λ[layer of site] · ((x aᵀ) bᵀ), computed in y's dtype.
    """

    def __init__(
        self,
        lora_weights: Mapping[str, LoRAWeights],
        num_layers: int,
        device: torch.device | str = "cpu",
    ) -> None:
        # A copy: what is trained here is never the caller's own tensor.
        self.a = {
            s: p.a.detach().to(device, torch.float32, copy=True) for s, p in lora_weights.items()
        }
        self.b = {
            s: (p.b.detach().to(device, torch.float32) * p.scaling) for s, p in lora_weights.items()
        }
        self.coefficients = torch.ones(num_layers, device=device)

    def parameters(self) -> dict[str, torch.Tensor]:
        """The pairs as trainable tensors, by `<site>.A` and `<site>.B`."""
        halves = {f"{s}.A": t for s, t in self.a.items()} | {f"{s}.B": t for s, t in self.b.items()}
        return {name: halves[name].requires_grad_() for name in sorted(halves)}

    def lora_weights(self) -> dict[str, LoRAWeights]:
        """The pairs as they are now, on the CPU, coefficients not applied."""
        return {
            s: LoRAWeights(self.a[s].detach().cpu().clone(), self.b[s].detach().cpu().clone())
            for s in self.a
        }

    @contextmanager
    def on(self, model: Any) -> Iterator[None]:
        """Attached while the block runs. Errors: SiteError."""
        handles = [
            module.register_forward_hook(self._hook(site))
            for site, module in site_modules(model, self.a, "the vector").items()
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


def fresh_lora_weights(
    shapes: Mapping[str, tuple[int, int]], rank: int, seed: int
) -> dict[str, LoRAWeights]:
    """Pairs to train: A uniform as in LoRA (Kaiming with a = √5), B zero. Shapes are (D_out, D_in).

    So the vector begins as exactly nothing (Hu et al. 2021, arXiv:2106.09685).
    """
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for site in sorted(shapes):
        d_out, d_in = shapes[site]
        bound = 1.0 / d_in**0.5
        a = (torch.rand(rank, d_in, generator=generator) * 2 - 1) * bound
        made[site] = LoRAWeights(a, torch.zeros(d_out, rank))
    return made
