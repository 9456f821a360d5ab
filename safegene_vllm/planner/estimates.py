"""Memory and time of each way to serve the tenants, by a roofline: bytes moved, and launches.

For comparing five ways on one card: the gain table, composed slots, one engine per checkpoint,
stock multi-LoRA without safety, and that with a guard asked in front. A step takes the longer of
its bytes at the card's bandwidth and its products at the card's rate, plus a fixed time for every
kernel that adapters and vector add. Kernels of the model itself overlap and are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from safegene_vllm.planner.slots import (
    gain_bytes,
    lora_bytes,
    rank_bucket,
    slot_bytes,
    vector_bytes,
    wrapped,
)
from safegene_vllm.planner.workload import GAIN_LAUNCHES, HOST_LAUNCHES, Workload


@dataclass(frozen=True)
class StepEstimate:
    """One decode step: bytes read by what they are, products, launches, and the time of it all."""

    weight_bytes: int
    kv_bytes: int
    adapter_bytes: int
    vector_bytes: int
    flops: float
    launches: int
    seconds: float

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.adapter_bytes + self.vector_bytes


@dataclass(frozen=True)
class ServingMode:
    """One way to serve, per engine unless it says otherwise.

    `bucket` is None without LoRA slots. `sequences` fit into the KV cache at full length, `batch`
    of them decode in a step. `tokens_per_s` is one card's. `prefill_s` is the time of one prompt
    alone, `added_ttft_s` what a guard adds before the first token. `host_bytes`: adapters kept
    ready in host memory (entries: `host_adapters`). `reload_s`: one adapter from host memory into
    a slot.
    """

    name: str
    safe: bool
    engines: int
    gpus: int
    bucket: int | None
    weight_bytes: int
    vector_bytes: int
    slot_bytes: int
    gain_bytes: int
    overhead_bytes: int
    kv_bytes: int
    kv_tokens: int
    sequences: int
    batch: int
    step: StepEstimate
    prefill_s: float
    added_ttft_s: float
    tokens_per_s: float
    host_adapters: int
    host_bytes: int
    reload_s: float

    @property
    def fits(self) -> bool:
        return self.sequences >= 1


MODES = ("gain", "composed", "weights", "stock", "guard")
"""In the order of the tables. The first three are values of `safegene serve --apply`."""


def plan_modes(ask: Workload) -> dict[str, ServingMode]:
    """Every mode that the tenants allow: full checkpoints are served by weight load alone.

    Errors: ConfigError (a rank that no slot holds).
    """
    names = ("weights",) if ask.checkpoints else MODES
    return {name: plan_mode(ask, name) for name in names}


def plan_mode(ask: Workload, name: str) -> ServingMode:
    """One of MODES. Errors: ConfigError (a rank that no slot holds)."""
    ways: dict[str, Callable[[Workload], ServingMode]] = {
        "gain": _gain,
        "composed": _composed,
        "weights": _weights,
        "stock": _stock,
        "guard": _guard,
    }
    return ways[name](ask)


def _gain(ask: Workload) -> ServingMode:
    """The vector once beside the slots; our kernels run both products, torch's come on top."""
    shape, d = ask.shape, ask.dtype_bytes
    targets = {*ask.own_targets, *ask.safety_targets}
    stacked = ask.kernels == "torch"
    vector = vector_bytes(
        shape, ask.safety_targets, ask.vector_rank, ask.safety_layers, d, stacked=stacked
    )
    carried = len(wrapped(shape, ask.safety_targets)) * ask.safety_layers
    return _slotted(
        ask,
        "gain",
        rank=max(ask.adapter_rank, 1),
        targets=targets,
        vector=vector,
        gains=gain_bytes(shape.layers, ask.device_slots, ask.batched_tokens),
        launches=carried * (GAIN_LAUNCHES[ask.kernels] - HOST_LAUNCHES),
        own_bytes=lora_bytes(shape, ask.own_targets, ask.adapter_rank, d),
    )


def _composed(ask: Workload) -> ServingMode:
    """The vector inside every adapter: rank of tenant and vector together."""
    shape, d = ask.shape, ask.dtype_bytes
    own = lora_bytes(shape, ask.own_targets, ask.adapter_rank, d)
    share = lora_bytes(shape, ask.safety_targets, ask.vector_rank, d)
    meet = not ask.own_targets or set(ask.own_targets) & set(ask.safety_targets)
    apart = max(ask.adapter_rank, ask.vector_rank)
    return _slotted(
        ask,
        "composed",
        rank=ask.adapter_rank + ask.vector_rank if meet else apart,
        targets={*ask.own_targets, *ask.safety_targets},
        own_bytes=own + share * ask.safety_layers // shape.layers,
    )


def _stock(ask: Workload) -> ServingMode:
    """The tenants' adapters alone, unprotected: what the others are compared with."""
    shape, d = ask.shape, ask.dtype_bytes
    return _slotted(
        ask,
        "stock",
        rank=max(ask.adapter_rank, 1),
        targets=set(ask.own_targets),
        own_bytes=lora_bytes(shape, ask.own_targets, ask.adapter_rank, d),
        safe=False,
    )


def _guard(ask: Workload) -> ServingMode:
    """Stock multi-LoRA; every request is first read by a guard on the same weights."""
    asked = ask.prompt_tokens + ask.guard_prompt_tokens
    base = _stock(ask)
    verdict_s = ask.guard_output_tokens * base.step.seconds
    # Guard requests decode beside the others: more sequences, and one more prefill per request.
    extra = base.batch * ask.guard_output_tokens / ask.output_tokens
    step = _step(
        ask, base.batch + math.ceil(extra), base.step.adapter_bytes, 0, base.step.launches, 0
    )
    prefills_s = _compute_s(ask, ask.prompt_tokens) + _compute_s(ask, asked)
    return replace(
        base,
        name="guard",
        safe=True,
        step=step,
        added_ttft_s=_prefill_s(ask, asked) + verdict_s,
        tokens_per_s=_rate(ask, base.batch, step, prefills_s),
    )


def _weights(ask: Workload) -> ServingMode:
    """One engine per checkpoint, several to a card while weights and their sequences fit."""
    engines = ask.held if ask.adapter_rank == 0 and ask.profiles else ask.tenants
    weight = ask.shape.parameters * ask.dtype_bytes
    wanted = max(1, math.ceil(ask.concurrency / engines))
    one = (ask.prompt_tokens + ask.output_tokens) * ask.shape.kv_bytes_per_token(ask.dtype_bytes)
    usable = int(ask.gpu.memory_bytes * ask.utilization)
    share = max(1, usable // (weight + ask.overhead_bytes + wanted * one))
    share = min(share, engines)
    kv = usable // share - weight - ask.overhead_bytes
    tokens, sequences = _capacity(ask, kv)
    batch = min(wanted, sequences)
    step = _step(ask, batch, 0, 0, 0, 0)
    return ServingMode(
        name="weights",
        safe=True,
        engines=engines,
        gpus=math.ceil(engines / share),
        bucket=None,
        weight_bytes=weight,
        vector_bytes=0,
        slot_bytes=0,
        gain_bytes=0,
        overhead_bytes=ask.overhead_bytes,
        kv_bytes=max(kv, 0),
        kv_tokens=tokens,
        sequences=sequences,
        batch=batch,
        step=step,
        prefill_s=_prefill_s(ask, ask.prompt_tokens),
        added_ttft_s=0.0,
        # Engines that share a card share its bandwidth, so a card decodes what one engine would.
        tokens_per_s=_rate(ask, batch, step, _compute_s(ask, ask.prompt_tokens)),
        host_adapters=0,
        host_bytes=0,
        reload_s=0.0,
    )


def _slotted(
    ask: Workload,
    name: str,
    *,
    rank: int,
    targets: set[str],
    own_bytes: int,
    vector: int = 0,
    gains: int = 0,
    launches: int = 0,
    safe: bool = True,
) -> ServingMode:
    """One engine for all tenants, in LoRA slots of the bucket that holds `rank`."""
    shape, d = ask.shape, ask.dtype_bytes
    bucket = rank_bucket(rank)
    slot = slot_bytes(shape, targets, bucket, d)
    slots = ask.device_slots
    weight = shape.parameters * d
    usable = int(ask.gpu.memory_bytes * ask.utilization)
    kv = usable - weight - vector - gains - slots * slot - ask.overhead_bytes
    tokens, sequences = _capacity(ask, kv)
    batch = min(ask.concurrency, sequences)
    active = min(ask.active_tenants, slots, batch)
    launches += shape.layers * len(wrapped(shape, targets)) * HOST_LAUNCHES
    step = _step(ask, batch, active * slot, vector, launches, slot)
    # A server keeps the revision before the current one ready as well; with the gain table both
    # share the adapter's memory where only coefficients differ.
    entries = 2 * ask.held
    each = own_bytes or 2 * d
    copies = entries if name == "composed" else ask.held
    kept = min(copies, max(slots, ask.host_bytes // each))
    return ServingMode(
        name=name,
        safe=safe,
        engines=1,
        gpus=1,
        bucket=bucket,
        weight_bytes=weight,
        vector_bytes=vector,
        slot_bytes=slots * slot,
        gain_bytes=gains,
        overhead_bytes=ask.overhead_bytes,
        kv_bytes=max(kv, 0),
        kv_tokens=tokens,
        sequences=sequences,
        batch=batch,
        step=step,
        prefill_s=_prefill_s(ask, ask.prompt_tokens),
        added_ttft_s=0.0,
        tokens_per_s=_rate(ask, batch, step, _compute_s(ask, ask.prompt_tokens)),
        host_adapters=max(slots, entries * kept // copies),
        host_bytes=kept * each,
        reload_s=each / ask.gpu.link_bytes_per_s,
    )


def _capacity(ask: Workload, kv_bytes: int) -> tuple[int, int]:
    """Tokens that `kv_bytes` hold, and whole sequences of prompt and output."""
    tokens = max(kv_bytes, 0) // ask.shape.kv_bytes_per_token(ask.dtype_bytes)
    return tokens, tokens // (ask.prompt_tokens + ask.output_tokens)


def _step(
    ask: Workload, batch: int, adapters: int, vector: int, launches: int, slot: int
) -> StepEstimate:
    """A decode step of `batch` sequences that reads `adapters` and `vector` bytes beside the rest.

    Every token is multiplied with its own slot (`slot` bytes) and with the vector.
    """
    shape, d = ask.shape, ask.dtype_bytes
    weight = shape.read_parameters * d
    kv = batch * ask.context_tokens * shape.kv_bytes_per_token(d)
    # Two per parameter and token, two products of scores and values per head and cached token.
    flops = batch * (
        2.0 * (shape.read_parameters + (slot + vector) / d)
        + 4.0 * shape.layers * shape.heads * shape.head_dim * ask.context_tokens
    )
    moved = weight + kv + adapters + vector
    seconds = max(moved / ask.gpu.bytes_per_s, flops / ask.gpu.flops_per_s)
    return StepEstimate(
        weight, kv, adapters, vector, flops, launches, seconds + launches * ask.launch_s
    )


def _rate(ask: Workload, batch: int, step: StepEstimate, prefill_s: float) -> float:
    """Tokens per second of a full batch: for every token, its share of a step and of its prompt."""
    return batch / (step.seconds + batch / ask.output_tokens * prefill_s)


def _compute_s(ask: Workload, tokens: int) -> float:
    """A prompt's products, alone: what it takes from the decoding beside it."""
    shape = ask.shape
    layers = shape.read_parameters - shape.vocab * shape.linears[0].d_in
    attention = 2.0 * shape.layers * shape.heads * shape.head_dim * tokens * tokens
    return (2.0 * layers * tokens + attention) / ask.gpu.flops_per_s


def _prefill_s(ask: Workload, tokens: int) -> float:
    """A prompt alone on an idle engine: its products, or the weights if those take longer."""
    read_s = ask.shape.read_parameters * ask.dtype_bytes / ask.gpu.bytes_per_s
    return max(_compute_s(ask, tokens), read_s)
