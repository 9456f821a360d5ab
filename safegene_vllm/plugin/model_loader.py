"""Model loader `--load-format safegene`: adds λ_l · B·A to each weight while it streams in.

For full checkpoints, at no cost per token. Works on checkpoint names, before vLLM fuses or shards,
in threads that run a few tensors ahead. Every site of the vector must occur exactly once, or the
engine does not start. Quantized weights are rejected (preflight.py).
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
from safegene_vllm.formats.tensor_names import spellings
from safegene_vllm.plugin import compat
from safegene_vllm.plugin.preflight import read_engine_plan

MERGE_THREADS = min(4, os.cpu_count() or 1)
"""Threads that merge, in addition to the one in which vLLM copies."""
MAX_PENDING = MERGE_THREADS + 1
"""Tensors merged ahead of vLLM; this many more are in memory."""

_Loader: Any = compat.resolve("DefaultModelLoader")


@dataclass(frozen=True)
class MergedVector:
    """Summary of what was added to one worker's weights, stored on the model for its receipt.

    `load_s`: seconds of merging, summed over threads.
    """

    family: Family
    profile: Profile
    sites: int
    load_s: float

    def receipt(self, rank: int, world_size: int) -> Receipt:
        """Return the receipt of one rank."""
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
    """vLLM's default loader with the vector added to what its weights iterator yields."""

    def __init__(self, load_config: Any) -> None:
        config = compat.resolve("get_current_vllm_config")()
        plan = read_engine_plan(config)
        if plan is None or plan.settings.family is None or plan.base_profile is None:
            raise ConfigError("--load-format safegene needs safegene.family and a profile.")
        super().__init__(load_config)
        self._family = load_family(plan.settings.family)
        self._profile = plan.base_profile

    def _prepare_weights(self, *args: Any, **kwargs: Any) -> Any:
        # vLLM's default loader knows no format of this name.
        format_ = self.load_config.load_format
        self.load_config.load_format = "safetensors"
        try:
            return super()._prepare_weights(*args, **kwargs)
        finally:
            self.load_config.load_format = format_

    def get_all_weights(self, model_config: Any, model: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the checkpoint's tensors by name with the vector; a draft model's are unchanged."""
        stream = super().get_all_weights(model_config, model)
        if model_config.runner_type == "draft":
            yield from stream
            return
        by_weight = {
            merged_weight_name(name): site
            for site in self._family.lora_weights
            for name in spellings(site)
        }
        occurrences: Counter[str | None] = Counter()
        merge_s = 0.0
        pending: deque[tuple[str, Future[tuple[torch.Tensor, float]]]] = deque()
        with ThreadPoolExecutor(MERGE_THREADS, "safegene-merge") as threads:

            def next_merged() -> tuple[str, torch.Tensor]:
                nonlocal merge_s
                name, merged = pending.popleft()
                weight, seconds = merged.result()
                merge_s += seconds
                return name, weight

            for name, weight in stream:
                site = by_weight.get(name)
                occurrences[site] += 1
                pending.append((name, threads.submit(self._merge, site, weight)))
                if len(pending) > MAX_PENDING:
                    yield next_merged()
            while pending:
                yield next_merged()
        problems = [
            f"{site} occurs {occurrences[site]} times"
            for site in self._family.lora_weights
            if occurrences[site] != 1
        ]
        if problems:
            shown = "; ".join(problems[:5]) + (
                f"; {len(problems) - 5} more" if problems[5:] else ""
            )
            raise FamilyMismatchError(
                f"family {self._family.header.name!r} ({self._family.digest}) does not fit the "
                f"checkpoint {model_config.model}: {shown}; each must occur once."
            )
        model.safegene_merged = MergedVector(
            self._family, self._profile, occurrences.total() - occurrences[None], merge_s
        )

    def _merge(self, site: str | None, weight: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Return weight (D_out, D_in) plus the site's part of the vector, and the seconds it took.

        The dtype is that of `weight`. Called in several threads.
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
