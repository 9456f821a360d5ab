"""What a deployment is asked to hold and to do: the planner's input, checked."""

from __future__ import annotations

from dataclasses import dataclass

from safegene_vllm.errors import ConfigError
from safegene_vllm.planner.gpus import Gpu
from safegene_vllm.planner.model_shape import ModelShape

HOST_LAUNCHES = 3
"""Kernels of the host's own LoRA product per linear layer: zeroes, shrink, expand."""
GAIN_LAUNCHES = {"triton": 2, "torch": HOST_LAUNCHES + 3}
"""Kernels per linear layer with a vector, the tenants' product included, by safegene.kernels."""


@dataclass(frozen=True)
class Workload:
    """One model on one kind of GPU, its tenants, its vector and its load.

    `profiles`: revisions held at once (default: one per tenant). `adapter_rank` 0: tenants are
    profiles on the base, without an adapter. `checkpoints`: tenants are full fine-tunes.
    `concurrency`: sequences decoded at once, spread over as many tenants as possible unless
    `active` says how many. `vector_layers` counts selected layers. Empty targets: every linear
    layer. `host_bytes`: host memory for adapters. `guard_*`: tokens around the prompt, and of the
    verdict, of a guard on the same weights that is asked once per request. `kernels`: what the
    gain table runs on, "triton" or "torch".
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
        """Errors: ConfigError naming each value that cannot be."""
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
        faults = [
            f"{name} {value}: expected {least} or more"
            for name, (value, least) in whole.items()
            if value is not None and value < least
        ]
        if self.vector_layers is not None and not 1 <= self.vector_layers <= self.shape.layers:
            faults.append(
                f"vector layers {self.vector_layers}: expected 1 to {self.shape.layers}, the "
                "layers of this model"
            )
        if self.kernels not in GAIN_LAUNCHES:
            faults.append(f"kernels {self.kernels!r}: expected {' or '.join(GAIN_LAUNCHES)}")
        if not 0 < self.utilization <= 1:
            faults.append(f"memory utilization {self.utilization}: expected above 0, at most 1")
        if min(self.overhead_bytes, self.host_bytes, self.launch_s) < 0:
            faults.append("overhead, host memory and launch time: expected 0 or more")
        for what, targets in (("adapter", self.adapter_targets), ("vector", self.vector_targets)):
            unknown = sorted(set(targets) - set(self.shape.sites))
            if unknown:
                faults.append(
                    f"{what} targets {', '.join(unknown)}: this model has "
                    f"{', '.join(self.shape.sites)}"
                )
        if faults:
            raise ConfigError("; ".join(faults) + ".")

    # -- what follows from it, whatever the mode ---------------------------------------------------

    @property
    def held(self) -> int:
        """Revisions that an engine holds: names with a profile each."""
        return max(self.tenants, self.profiles or 0)

    @property
    def own_targets(self) -> tuple[str, ...]:
        """Sites of the tenants' adapters; none without adapters."""
        if self.adapter_rank == 0:
            return ()
        return self.adapter_targets or self.shape.sites

    @property
    def safety_targets(self) -> tuple[str, ...]:
        return self.vector_targets or self.shape.sites

    @property
    def safety_layers(self) -> int:
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
