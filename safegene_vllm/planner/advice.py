"""Which mode and settings to take, why, and what to look out for.

For turning planned modes into one command line. The numbers are modes.py's; nothing is measured.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from safegene_vllm.planner.estimates import ServingMode
from safegene_vllm.planner.slots import rank_bucket
from safegene_vllm.planner.workload import Workload

FASTER = 1.05
"""Composed slots must be so much faster to make up for a reload at every coefficient change."""
SHARE = 0.25
"""Slots that take more of what weights leave than this are worth a word."""


@dataclass(frozen=True)
class Advice:
    """`mode` is None where nothing fits; `command` starts it, with placeholders in capitals."""

    mode: str | None
    command: tuple[str, ...]
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]

    def shown(self) -> str:
        return shlex.join(self.command)


def advise(ask: Workload, modes: Mapping[str, ServingMode], model: str) -> Advice:
    """The mode to take among those that protect and fit; `model` goes into the command."""
    mode, reasons = _choose(ask, modes)
    warnings = [*ask.shape.remarks]
    if mode is None:
        return Advice(None, (), tuple(reasons), tuple(warnings))
    warnings += _warnings(ask, modes[mode])
    return Advice(mode, _command(ask, modes[mode], model), tuple(reasons), tuple(warnings))


def _choose(ask: Workload, modes: Mapping[str, ServingMode]) -> tuple[str | None, list[str]]:
    if not any(modes[n].fits for n in ("gain", "composed", "weights") if n in modes):
        need = ask.shape.parameters * ask.dtype_bytes + ask.overhead_bytes
        return None, [
            f"nothing fits on {ask.gpu.name}: weights and overhead are {_gb(need)} of "
            f"{_gb(int(ask.gpu.memory_bytes * ask.utilization))}, and one sequence of "
            f"{ask.prompt_tokens + ask.output_tokens} tokens must fit beside them; take a larger "
            "card, fewer --slots or a shorter prompt"
        ]
    weights = modes["weights"]
    if ask.checkpoints:
        return "weights", [
            f"tenants are full checkpoints, which share no weights: {weights.engines} engines on "
            f"{weights.gpus} x {ask.gpu.name}; the vector costs nothing per token",
            "if their fine-tunes can be had as LoRA adapters, plan without --checkpoints",
        ]
    if ask.held == 1 and weights.fits:
        return "weights", ["one tenant: merged into the weights, it costs no slot and no kernel"]
    gain, composed = modes["gain"], modes["composed"]
    if not gain.fits and not composed.fits:
        return "weights", [
            f"with {ask.device_slots} slots no sequence fits beside them on {ask.gpu.name}; "
            "fewer --slots would let all tenants share one engine"
        ]
    reasons = [
        f"one engine for {ask.tenants} tenants; weight load would take {weights.engines} "
        f"engines on {weights.gpus} x {ask.gpu.name}"
    ]
    same = gain.bucket == composed.bucket
    faster = composed.step.seconds * FASTER < gain.step.seconds
    if not gain.fits or (same and faster):
        reasons.append(
            f"rank {ask.adapter_rank} + {ask.vector_rank} still fits a slot of rank "
            f"{composed.bucket}, so composed slots are no larger and save "
            f"{_ms(gain.step.seconds - composed.step.seconds)} of kernels a step; a changed "
            "coefficient then reloads the adapter"
        )
        return "composed", reasons
    reasons.append(
        f"the vector is held once ({_mb(gain.vector_bytes)}, with {_mb(gain.gain_bytes)} of gains) "
        "whatever the number of tenants and profiles; a changed coefficient writes one row"
    )
    if not same:
        reasons.append(
            f"composed slots would be of rank {composed.bucket} instead of {gain.bucket}: "
            f"{_gb(composed.slot_bytes)} instead of {_gb(gain.slot_bytes)}, and "
            f"{_mb(composed.step.adapter_bytes - gain.step.adapter_bytes)} more read a step "
            f"against {_mb(gain.step.vector_bytes)}"
        )
    if faster:
        reasons.append(
            f"by bytes and launches, composed slots would decode faster "
            f"({_ms(composed.step.seconds)} against {_ms(gain.step.seconds)} a step); measure "
            "both if decode speed is what you pay for"
        )
    return "gain", reasons


def _warnings(ask: Workload, mode: ServingMode) -> list[str]:
    found = []
    if mode.batch < ask.concurrency and mode.engines == 1:
        found.append(
            f"KV cache holds {mode.sequences} sequences of {ask.prompt_tokens + ask.output_tokens} "
            f"tokens, {ask.concurrency} were asked for; the rest waits"
        )
    if mode.bucket is None:
        if mode.engines > mode.gpus:
            found.append(
                f"{-(-mode.engines // mode.gpus)} engines share a card: give each "
                "--gpu-memory-utilization accordingly; their steps share its bandwidth"
            )
        return found
    slots = ask.device_slots
    wanted = min(ask.active or ask.concurrency, ask.concurrency, ask.held)
    if slots < wanted:
        found.append(
            f"{slots} slots below {wanted} concurrent tenants: no batch holds more tenants than "
            "slots, so requests of further tenants wait, and slots are reloaded as they change"
        )
    if slots < ask.held:
        found.append(
            f"{ask.held} revisions on {slots} slots: the least recently used one makes room, and "
            f"coming back takes {_ms(mode.reload_s)} or more from host memory, in which the engine "
            "does nothing else"
        )
    if mode.host_adapters < 2 * ask.held:
        found.append(
            f"host memory keeps {mode.host_adapters} of {2 * ask.held} revisions (a server keeps "
            "each tenant's way back too); the others are read from disk, again while the engine "
            "waits: raise --host-memory-gb and --max-cpu-loras"
        )
    usable = ask.gpu.memory_bytes * ask.utilization - mode.weight_bytes - mode.overhead_bytes
    if usable > 0 and mode.slot_bytes > SHARE * usable:
        found.append(
            f"slots take {_gb(mode.slot_bytes)} of the {_gb(int(usable))} that weights leave; "
            "fewer --slots leave more KV cache"
        )
    used = max(ask.adapter_rank, 1)
    if mode.name == "composed":
        used = ask.adapter_rank + ask.vector_rank
    if used < (mode.bucket or used) and mode.bucket != rank_bucket(1):
        found.append(
            f"rank {used} in slots of rank {mode.bucket}: the padding is held and read like the "
            "rest"
        )
    return found


def _command(ask: Workload, mode: ServingMode, model: str) -> tuple[str, ...]:
    """What `safegene serve` is to be given; FAMILY and CHECKPOINT are yours to fill in."""
    start = ["safegene", "serve"]
    common = ["--dtype", {2: "bfloat16", 4: "float32"}[ask.dtype_bytes]]
    if mode.name == "weights":
        share = -(-mode.engines // mode.gpus)
        part = int(ask.utilization / share * 100) / 100
        common += ["--gpu-memory-utilization", f"{part:g}", "--max-num-seqs", str(mode.batch)]
        return (*start, "CHECKPOINT", "--family", "FAMILY", "--apply", "weights", *common)
    targets = {*ask.own_targets, *ask.safety_targets}
    return (
        *start,
        model,
        *("--family", "FAMILY", "--apply", mode.name, "--server-config", "safegene.yaml"),
        *("--slots", str(ask.device_slots), "--max-lora-rank", str(mode.bucket)),
        *("--max-cpu-loras", str(mode.host_adapters)),
        *("--lora-target-modules", *(s for s in ask.shape.sites if s in targets)),
        *("--max-num-seqs", str(mode.batch), "--max-num-batched-tokens", str(ask.batched_tokens)),
        *("--gpu-memory-utilization", f"{ask.utilization:g}", *common),
    )


def _gb(value: int) -> str:
    return f"{value / 1e9:.2f} GB"


def _mb(value: int) -> str:
    return f"{value / 1e6:.1f} MB"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"
