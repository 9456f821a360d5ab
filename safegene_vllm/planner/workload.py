"""Validated input of the planner: model, GPU, tenants, vector and load."""

from __future__ import annotations

from dataclasses import dataclass

from safegene_vllm.errors import ConfigError
from safegene_vllm.planner.gpus import Gpu
from safegene_vllm.planner.model_shape import ModelShape

LORA_LAUNCHES = 3
"""Kernels of vLLM's LoRA product per linear layer: zeroes, shrink, expand."""
GAIN_LAUNCHES = {"triton": 2, "torch": LORA_LAUNCHES + 3}
"""Kernels per linear layer with a vector, the tenants' product included, by safegene.kernels."""


@dataclass(frozen=True)
class Workload:
    """One model on one kind of GPU, its tenants, its vector and its load.

    `profiles`: loaded revisions (default: one per tenant). `adapter_rank` 0: tenants are profiles
    on the base model, without an adapter. `checkpoints`: tenants are full fine-tunes.
    `concurrency`: sequences decoded at once, of `active` tenants (default: as many as possible).
    `vector_layers` counts selected layers. Empty targets: every linear layer. `host_bytes`: host
    memory for adapters. `guard_*`: tokens around the prompt, and of the verdict, of a guard on the
    same weights, queried once per request. `kernels` of the gain table: "triton" or "torch".
    """

    shape: ModelShape
    gpu: Gpu
    tenants: int
    profiles: int | None = None
    checkpoints: bool = False
    adapter_rank: int = 16
    adapter_targets: tuple[str, ...] = ()
    vector_rank: int = 16
    vector_layers: int | None = None
    vector_targets: tuple[str, ...] = ()
    dtype_bytes: int = 2
    slots: int | None = None
    concurrency: int = 32
    active: int | None = None
    prompt_tokens: int = 512
    output_tokens: int = 128
    batched_tokens: int = 8192
    utilization: float = 0.92
    overhead_bytes: int = 3 * 10**9
    host_bytes: int = 64 * 10**9
    launch_s: float = 2e-6
    kernels: str = "triton"
    guard_prompt_tokens: int = 150
    guard_output_tokens: int = 1

    def __post_init__(self) -> None:
        """Validate. Errors: ConfigError naming each invalid value."""
        whole = {
            "tenants": (self.tenants, 1),
            "profiles": (self.profiles, 1),
            "adapter rank": (self.adapter_rank, 0),
            "vector rank": (self.vector_rank, 1),
            "slots": (self.slots, 1),
            "concurrency": (self.concurrency, 1),
            "active tenants": (self.active, 1),
            "prompt tokens": (self.prompt_tokens, 1),
            "output tokens": (self.output_tokens, 1),
            "batched tokens": (self.batched_tokens, 1),
            "guard prompt tokens": (self.guard_prompt_tokens, 0),
            "guard output tokens": (self.guard_output_tokens, 0),
        }
        problems = [
            f"{name} {value}: expected {minimum} or more"
            for name, (value, minimum) in whole.items()
            if value is not None and value < minimum
        ]
        if self.vector_layers is not None and not 1 <= self.vector_layers <= self.shape.layers:
            problems.append(
                f"vector layers {self.vector_layers}: expected 1 to {self.shape.layers}, the "
                "layers of this model"
            )
        if self.kernels not in GAIN_LAUNCHES:
            problems.append(f"kernels {self.kernels!r}: expected {' or '.join(GAIN_LAUNCHES)}")
        if not 0 < self.utilization <= 1:
            problems.append(f"memory utilization {self.utilization}: expected above 0, at most 1")
        if min(self.overhead_bytes, self.host_bytes, self.launch_s) < 0:
            problems.append("overhead, host memory and launch time: expected 0 or more")
        for what, targets in (("adapter", self.adapter_targets), ("vector", self.vector_targets)):
            unknown = sorted(set(targets) - set(self.shape.sites))
            if unknown:
                problems.append(
                    f"{what} targets {', '.join(unknown)}: this model has "
                    f"{', '.join(self.shape.sites)}"
                )
        if problems:
            raise ConfigError("; ".join(problems) + ".")

    @property
    def held(self) -> int:
        """Number of revisions loaded in an engine, each with a profile."""
        return max(self.tenants, self.profiles or 0)

    @property
    def own_targets(self) -> tuple[str, ...]:
        """Target modules of the tenants' adapters; none without adapters."""
        if self.adapter_rank == 0:
            return ()
        return self.adapter_targets or self.shape.sites

    @property
    def safety_targets(self) -> tuple[str, ...]:
        """Target modules of the vector."""
        return self.vector_targets or self.shape.sites

    @property
    def safety_layers(self) -> int:
        """Number of layers with a vector."""
        return self.vector_layers or self.shape.layers

    @property
    def active_tenants(self) -> int:
        """Distinct tenants in one step's batch, if slots allow."""
        return min(self.active or self.concurrency, self.concurrency, self.held)

    @property
    def device_slots(self) -> int:
        """LoRA slots of an engine (--max-loras)."""
        return self.slots or self.active_tenants

    @property
    def context_tokens(self) -> int:
        """Mean length of a sequence while it decodes: its prompt and half of its output."""
        return self.prompt_tokens + self.output_tokens // 2
