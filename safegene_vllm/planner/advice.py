"""Recommended application mode and settings, with reasons and warnings."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace

from safegene_vllm.planner.estimates import ServingMode, plan_mode
from safegene_vllm.planner.slots import rank_bucket
from safegene_vllm.planner.workload import Workload

FASTER = 1.05
"""Minimum speedup of composed slots that outweighs a reload at every coefficient change."""
SHARE = 0.25
"""Share of the memory left by the weights above which slots cause a warning."""


@dataclass(frozen=True)
class Advice:
    """Recommended mode (None: nothing fits) and its command, with placeholders in capitals."""

    mode: str | None
    command: tuple[str, ...]
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]

    def shown(self) -> str:
        """Return the command as a line for a shell."""
        return shlex.join(self.command)


def fit_slots(workload: Workload) -> Workload:
    """Reduce slots that were not given to the sequences that their memory leaves room for.

    A slot serves one tenant of a batch, so more slots than sequences only take KV cache away.
    """
    if workload.slots is not None or workload.checkpoints:
        return workload
    slots = workload.active_tenants
    while slots > 1:
        found = plan_mode(replace(workload, slots=slots), "gain").sequences
        if found >= slots:
            break
        slots = max(1, found, slots // 2) if found < slots - 1 else found
    return workload if slots == workload.active_tenants else replace(workload, slots=slots)


def advise(
    workload: Workload,
    modes: Mapping[str, ServingMode],
    model: str,
    family: str | None = None,
) -> Advice:
    """Choose among the modes that protect and fit; `model` and `family` go into the command."""
    mode, reasons = _choose(workload, modes)
    warnings = [*workload.shape.remarks]
    if mode is None:
        return Advice(None, (), tuple(reasons), tuple(warnings))
    warnings += _warnings(workload, modes[mode])
    command = _command(workload, modes[mode], model, family or "FAMILY")
    return Advice(mode, command, tuple(reasons), tuple(warnings))


def _choose(workload: Workload, modes: Mapping[str, ServingMode]) -> tuple[str | None, list[str]]:
    if not any(modes[n].fits for n in ("gain", "composed", "weights") if n in modes):
        need = workload.shape.parameters * workload.dtype_bytes + workload.overhead_bytes
        return None, [
            f"nothing fits on {workload.gpu.name}: weights and overhead are {_gb(need)} of "
            f"{_gb(int(workload.gpu.memory_bytes * workload.utilization))}, and one sequence of "
            f"{workload.prompt_tokens + workload.output_tokens} tokens must fit too; use a larger "
            "GPU, fewer --slots or a shorter prompt"
        ]
    weights = modes["weights"]
    if workload.checkpoints:
        return "weights", [
            f"tenants are full checkpoints, which share no weights: {weights.engines} engines on "
            f"{weights.gpus} x {workload.gpu.name} (estimate); the vector costs nothing per token",
            "if the fine-tunes exist as LoRA adapters, plan without --checkpoints",
        ]
    if workload.held == 1 and weights.fits:
        return "weights", ["one tenant: merged into the weights, it costs no slot and no kernel"]
    gain, composed = modes["gain"], modes["composed"]
    if not gain.fits and not composed.fits:
        return "weights", [
            f"{workload.device_slots} slots leave no KV cache for a sequence on "
            f"{workload.gpu.name}; with fewer --slots all tenants can share one engine"
        ]
    reasons = [
        f"one engine for {workload.tenants} tenants; weight load would take {weights.engines} "
        f"engines on {weights.gpus} x {workload.gpu.name} (estimate)"
    ]
    same = gain.bucket == composed.bucket
    faster = composed.step.seconds * FASTER < gain.step.seconds
    if not gain.fits or (same and faster):
        reasons.append(
            f"rank {workload.adapter_rank} + {workload.vector_rank} still fits a slot of rank "
            f"{composed.bucket}, so composed slots are no larger and save "
            f"{_ms(gain.step.seconds - composed.step.seconds)} of kernels per step; a changed "
            "coefficient then reloads the adapter"
        )
        return "composed", reasons
    reasons.append(
        f"the vector is in memory once ({_mb(gain.vector_bytes)}, plus {_mb(gain.gain_bytes)} of "
        "gains) for any number of tenants and profiles; a changed coefficient writes one row"
    )
    if not same:
        larger = (
            f"composed slots would be of rank {composed.bucket} instead of {gain.bucket}: "
            f"{_gb(composed.slot_bytes)} instead of {_gb(gain.slot_bytes)}"
        )
        more = composed.step.adapter_bytes - gain.step.adapter_bytes
        if composed.batch == gain.batch:
            larger += (
                f", and {_mb(more)} more read per step against {_mb(gain.step.vector_bytes)} "
                "(estimate)"
            )
        else:
            larger += f", and room for {composed.batch} sequences at once, not {gain.batch}"
        reasons.append(larger)
    if faster:
        reasons.append(
            f"by bytes and launches, composed slots would decode faster "
            f"({_ms(composed.step.seconds)} against {_ms(gain.step.seconds)} per step); measure "
            "both if decode speed matters most"
        )
    return "gain", reasons


def _warnings(workload: Workload, mode: ServingMode) -> list[str]:
    found = []
    if mode.batch < workload.concurrency and mode.engines == 1:
        found.append(
            f"KV cache holds {mode.sequences} (estimate) sequences of "
            f"{workload.prompt_tokens + workload.output_tokens} tokens, {workload.concurrency} "
            "were requested; the others wait"
        )
    if mode.bucket is None:
        if mode.engines > mode.gpus:
            found.append(
                f"{-(-mode.engines // mode.gpus)} engines share a GPU: give each "
                "--gpu-memory-utilization accordingly; their steps share its bandwidth"
            )
        return found
    slots = workload.device_slots
    if slots > mode.batch:
        found.append(
            f"{slots} slots for a batch of {mode.batch} (estimate): a slot serves one tenant of a "
            "batch, so fewer --slots leave more KV cache and lose nothing but reloads"
        )
    wanted = min(workload.active or workload.concurrency, workload.concurrency, workload.held)
    if slots < wanted:
        found.append(
            f"{slots} slots below {wanted} concurrent tenants: a batch has at most one tenant per "
            "slot, so requests of other tenants wait, and slots are reloaded"
        )
    if slots < workload.held:
        found.append(
            f"{workload.held} revisions on {slots} slots: the least recently used one is evicted, "
            f"and a reload from host memory takes {_ms(mode.reload_s)} or more, in which the "
            "engine does nothing else"
        )
    if mode.host_adapters < 2 * workload.held:
        found.append(
            f"host memory caches {mode.host_adapters} of {2 * workload.held} revisions (estimate; "
            "a server caches each tenant's previous one too); the others are read from disk while "
            "the engine waits: raise --host-memory-gb and --max-cpu-loras"
        )
    usable = (
        workload.gpu.memory_bytes * workload.utilization - mode.weight_bytes - mode.overhead_bytes
    )
    if usable > 0 and mode.slot_bytes > SHARE * usable:
        found.append(
            f"slots take {_gb(mode.slot_bytes)} of the {_gb(int(usable))} that weights leave; "
            "fewer --slots leave more KV cache"
        )
    used = max(workload.adapter_rank, 1)
    if mode.name == "composed":
        used = workload.adapter_rank + workload.vector_rank
    if used < (mode.bucket or used) and mode.bucket != rank_bucket(1):
        found.append(
            f"rank {used} in slots of rank {mode.bucket}: the padding takes memory and bandwidth "
            "too"
        )
    return found


def _command(workload: Workload, mode: ServingMode, model: str, family: str) -> tuple[str, ...]:
    """Arguments of `safegene serve`; names in capitals are left for the user to fill in."""
    start = ["safegene", "serve"]
    common = ["--dtype", {2: "bfloat16", 4: "float32"}[workload.dtype_bytes]]
    if mode.name == "weights":
        share = -(-mode.engines // mode.gpus)
        part = int(workload.utilization / share * 100) / 100
        common += ["--gpu-memory-utilization", f"{part:g}", "--max-num-seqs", str(mode.batch)]
        return (*start, "CHECKPOINT", "--family", family, "--apply", "weights", *common)
    targets = {*workload.own_targets, *workload.safety_targets}
    return (
        *start,
        model,
        *("--family", family, "--apply", mode.name, "--server-config", "safegene.yaml"),
        *("--slots", str(workload.device_slots), "--max-lora-rank", str(mode.bucket)),
        *("--max-cpu-loras", str(mode.host_adapters)),
        *("--lora-target-modules", *(s for s in workload.shape.sites if s in targets)),
        *(
            "--max-num-seqs",
            str(mode.batch),
            "--max-num-batched-tokens",
            str(workload.batched_tokens),
        ),
        *("--gpu-memory-utilization", f"{workload.utilization:g}", *common),
    )


def _gb(value: int) -> str:
    return f"{value / 1e9:.2f} GB"


def _mb(value: int) -> str:
    return f"{value / 1e6:.1f} MB"


def _ms(seconds: float) -> str:
    """Format a time; all times of the planner are estimates."""
    return f"{seconds * 1e3:.2f} ms (estimate)"
