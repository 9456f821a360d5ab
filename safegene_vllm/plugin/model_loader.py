"""`--load-format safegene`: adds λ_l · B·A to each weight while the checkpoint streams in.

For full checkpoints, at no cost per token. Works on checkpoint names, before the host fuses or
shards, in threads of its own and a few tensors ahead of the host. Every site of the vector must
pass by exactly once, or the engine does not start. Not for quantized weights (refused in
engine.py).
"""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from safegene_vllm.composition import merge_into, merged_weight_name
from safegene_vllm.errors import (
    ConfigError,
    FamilyMismatchError,
    ShapeError,
    VllmCompatibilityError,
)
from safegene_vllm.formats.adapter import layer_of
from safegene_vllm.formats.family import Family, load_family
from safegene_vllm.formats.profile import Profile
from safegene_vllm.formats.receipt import Receipt, gain_digest
from safegene_vllm.plugin import compat
from safegene_vllm.plugin.preflight import read_engine_plan

MERGING = min(4, os.cpu_count() or 1)
"""Threads that merge, beside the one in which the host copies."""
AHEAD = MERGING + 1
"""Tensors that may be merged before the host asks for them: this many more are in memory."""

_Loader: Any = compat.resolve("DefaultModelLoader")


@dataclass(frozen=True)
class Merged:
    """What was added to one worker's weights, kept on the model for its receipt.

    `load_s`: seconds of merging, added up over threads.
    """

    family: Family
    profile: Profile
    sites: int
    load_s: float

    def receipt(self, rank: int, world_size: int) -> Receipt:
        return Receipt(
            rank=rank,
            world_size=world_size,
            apply="weights",
            family=self.family.digest,
            sites_expected=len(self.family.lora_weights),
            sites_applied=self.sites,
            vector_bytes=0,
            base_profile=self.profile.digest,
            base_gain_digest=gain_digest(self.profile.coefficients),
            unprotected_mode=False,
            vllm_version=compat.version(),
            load_s=self.load_s,
        )


class SafegeneModelLoader(_Loader):
    """The stock loader, with the vector added to what its weights iterator yields."""

    def __init__(self, load_config: Any) -> None:
        config = compat.resolve("get_current_vllm_config")()
        plan = read_engine_plan(config)
        if plan is None or plan.settings.family is None or plan.base_profile is None:
            raise ConfigError("--load-format safegene needs safegene.family and a profile.")
        super().__init__(load_config)
        self._family = load_family(plan.settings.family)
        self._profile = plan.base_profile

    def _prepare_weights(self, *args: Any, **kwargs: Any) -> Any:
        """The stock loader knows no format of this name; to it we are safetensors."""
        format_ = self.load_config.load_format
        self.load_config.load_format = "safetensors"
        try:
            return super()._prepare_weights(*args, **kwargs)
        finally:
            self.load_config.load_format = format_

    def get_all_weights(self, model_config: Any, model: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """The checkpoint's tensors by name, the vector added. A draft model's pass unchanged."""
        stream = super().get_all_weights(model_config, model)
        if model_config.runner_type == "draft":
            yield from stream
            return
        by_weight = {merged_weight_name(site): site for site in self._family.lora_weights}
        came: Counter[str | None] = Counter()
        merge_s = 0.0
        waiting: deque[tuple[str, Future[tuple[torch.Tensor, float]]]] = deque()
        with ThreadPoolExecutor(MERGING, "safegene-merge") as merging:

            def done() -> tuple[str, torch.Tensor]:
                nonlocal merge_s
                name, merged = waiting.popleft()
                weight, seconds = merged.result()
                merge_s += seconds
                return name, weight

            for name, weight in stream:
                site = by_weight.get(name)
                came[site] += 1
                waiting.append((name, merging.submit(self._protected, site, weight)))
                if len(waiting) > AHEAD:
                    yield done()
            while waiting:
                yield done()
        faults = [
            f"{site} came {came[site]} times"
            for site in self._family.lora_weights
            if came[site] != 1
        ]
        if faults:
            shown = "; ".join(faults[:5]) + (f"; {len(faults) - 5} more" if faults[5:] else "")
            raise FamilyMismatchError(
                f"family {self._family.header.name!r} ({self._family.digest}) does not fit the "
                f"checkpoint {model_config.model}: {shown}; each must come once."
            )
        model.safegene_merged = Merged(
            self._family, self._profile, came.total() - came[None], merge_s
        )

    def _protected(self, site: str | None, weight: torch.Tensor) -> tuple[torch.Tensor, float]:
        """`weight` (D_out, D_in) plus this site's share of the vector, in weight's dtype; seconds.

        Called in several threads.
        """
        if site is None:
            return weight, 0.0
        started = time.perf_counter()
        lora = self._family.lora_weights[site]
        if tuple(weight.shape) != (lora.d_out, lora.d_in):
            raise ShapeError(
                f"{site}: the checkpoint has {tuple(weight.shape)}, the family "
                f"{(lora.d_out, lora.d_in)}; give the family of this model."
            )
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise VllmCompatibilityError(
                f"{site} is stored as {weight.dtype}: quantized weights cannot be added to; "
                "serve the plain checkpoint with apply=gain instead."
            )
        number = layer_of(site)
        assert number is not None
        merged = merge_into(weight, lora, self._profile.coefficients[number])
        return merged, time.perf_counter() - started
