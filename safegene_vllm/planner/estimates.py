"""Memory and decode time of five serving modes, by a roofline of bytes, products and launches.

Modes: gain table, composed slots, one engine per checkpoint, stock multi-LoRA without safety, and
stock multi-LoRA behind a guard model. A step takes the longer of its bytes at the GPU's bandwidth
and its products at the GPU's rate, plus a fixed time for every kernel that adapters and vector add.
Kernels of the model itself overlap and are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from safegene_vllm.planner.slots import (
    gain_bytes,
    lora_bytes,
    rank_bucket,
    slot_bytes,
    vector_bytes,
    wrapped,
)
from safegene_vllm.planner.workload import GAIN_LAUNCHES, LORA_LAUNCHES, Workload


@dataclass(frozen=True)
class StepEstimate:
    """One decode step: bytes read by kind, products, kernel launches, and time."""

    weight_bytes: int
    kv_bytes: int
    adapter_bytes: int
    vector_bytes: int
    flops: float
    launches: int
    seconds: float

    @property
    def bytes(self) -> int:
        """Bytes read in the step."""
        return self.weight_bytes + self.kv_bytes + self.adapter_bytes + self.vector_bytes


@dataclass(frozen=True, kw_only=True)
class ServingMode:
    """A serving mode, per engine unless stated otherwise.

    `bucket` is None without LoRA slots. `sequences` fit into the KV cache at full length, `batch`
    of them decode in a step. `tokens_per_s` is per GPU. `prefill_s` is the time of one prompt
    alone, `added_ttft_s` the guard's share of the time to first token. `host_bytes`: adapters
    cached in host memory (entries: `host_adapters`). `reload_s`: one adapter from host memory into
    a slot.
    """

    name: str
    safe: bool = True
    engines: int = 1
    gpus: int = 1
    bucket: int | None = None
    weight_bytes: int
    vector_bytes: int = 0
    slot_bytes: int = 0
    gain_bytes: int = 0
    overhead_bytes: int
    kv_bytes: int
    kv_tokens: int
    sequences: int
    batch: int
    step: StepEstimate
    prefill_s: float
    added_ttft_s: float = 0.0
    tokens_per_s: float
    host_adapters: int = 0
    host_bytes: int = 0
    reload_s: float = 0.0

    @property
    def fits(self) -> bool:
        """Whether at least one sequence fits into the KV cache."""
        return self.sequences >= 1


COMPARED = frozenset(("bucket", "weight_bytes", "vector_bytes", "slot_bytes", "gain_bytes"))
"""Fields of ServingMode that tests compare with a real engine or a real checkpoint."""
GIVEN = frozenset(("name", "safe", "engines", "overhead_bytes"))
"""Fields of ServingMode that follow from the workload without a model of the GPU."""
ESTIMATED = tuple(f.name for f in fields(ServingMode) if f.name not in COMPARED | GIVEN)
"""Fields of ServingMode that were never compared with a measurement."""


MODES = ("gain", "composed", "weights", "stock", "guard")
"""Names in the order of the tables. The first three are values of `safegene serve --apply`."""


def plan_modes(workload: Workload) -> dict[str, ServingMode]:
    """Plan every possible mode; full checkpoints are served by weight load alone.

    Errors: ConfigError (a rank above vLLM's largest).
    """
    names = ("weights",) if workload.checkpoints else MODES
    return {name: plan_mode(workload, name) for name in names}


def plan_mode(workload: Workload, name: str) -> ServingMode:
    """Plan one of MODES. Errors: ConfigError (a rank above vLLM's largest)."""
    planners: dict[str, Callable[[Workload], ServingMode]] = {
        "gain": _gain,
        "composed": _composed,
        "weights": _weights,
        "stock": _stock,
        "guard": _guard,
    }
    return planners[name](workload)


def _gain(workload: Workload) -> ServingMode:
    """The vector once, outside the slots; Triton kernels fuse both products, torch's are added."""
    shape, d = workload.shape, workload.dtype_bytes
    targets = {*workload.own_targets, *workload.safety_targets}
    stacked = workload.kernels == "torch"
    vector = vector_bytes(
        shape,
        workload.safety_targets,
        workload.vector_rank,
        workload.safety_layers,
        d,
        stacked=stacked,
    )
    carried = len(wrapped(shape, workload.safety_targets)) * workload.safety_layers
    return _slotted(
        workload,
        "gain",
        rank=max(workload.adapter_rank, 1),
        targets=targets,
        vector=vector,
        gains=gain_bytes(shape.layers, workload.device_slots, workload.batched_tokens),
        launches=carried * (GAIN_LAUNCHES[workload.kernels] - LORA_LAUNCHES),
        own_bytes=lora_bytes(shape, workload.own_targets, workload.adapter_rank, d),
    )


def _composed(workload: Workload) -> ServingMode:
    """The vector inside every adapter: rank of tenant and vector together."""
    shape, d = workload.shape, workload.dtype_bytes
    own = lora_bytes(shape, workload.own_targets, workload.adapter_rank, d)
    share = lora_bytes(shape, workload.safety_targets, workload.vector_rank, d)
    meet = not workload.own_targets or set(workload.own_targets) & set(workload.safety_targets)
    apart = max(workload.adapter_rank, workload.vector_rank)
    return _slotted(
        workload,
        "composed",
        rank=workload.adapter_rank + workload.vector_rank if meet else apart,
        targets={*workload.own_targets, *workload.safety_targets},
        own_bytes=own + share * workload.safety_layers // shape.layers,
    )


def _stock(workload: Workload) -> ServingMode:
    """The tenants' adapters alone, unprotected: the baseline."""
    shape, d = workload.shape, workload.dtype_bytes
    return _slotted(
        workload,
        "stock",
        rank=max(workload.adapter_rank, 1),
        targets=set(workload.own_targets),
        own_bytes=lora_bytes(shape, workload.own_targets, workload.adapter_rank, d),
        safe=False,
    )


def _guard(workload: Workload) -> ServingMode:
    """Stock multi-LoRA; a guard model on the same weights first reads every request."""
    guard_tokens = workload.prompt_tokens + workload.guard_prompt_tokens
    base = _stock(workload)
    verdict_s = workload.guard_output_tokens * base.step.seconds
    # Guard requests join the batch: more sequences, and one more prefill per request.
    extra = base.batch * workload.guard_output_tokens / workload.output_tokens
    step = _step(
        workload, base.batch + math.ceil(extra), base.step.adapter_bytes, 0, base.step.launches, 0
    )
    prefills_s = _compute_s(workload, workload.prompt_tokens) + _compute_s(workload, guard_tokens)
    return replace(
        base,
        name="guard",
        safe=True,
        step=step,
        added_ttft_s=_prefill_s(workload, guard_tokens) + verdict_s,
        tokens_per_s=_rate(workload, base.batch, step, prefills_s),
    )


def _weights(workload: Workload) -> ServingMode:
    """One engine per checkpoint, several per GPU while weights and their sequences fit."""
    engines = (
        workload.held if workload.adapter_rank == 0 and workload.profiles else workload.tenants
    )
    weight = workload.shape.parameters * workload.dtype_bytes
    wanted = max(1, math.ceil(workload.concurrency / engines))
    one = (workload.prompt_tokens + workload.output_tokens) * workload.shape.kv_bytes_per_token(
        workload.dtype_bytes
    )
    usable = int(workload.gpu.memory_bytes * workload.utilization)
    share = max(1, usable // (weight + workload.overhead_bytes + wanted * one))
    share = min(share, engines)
    kv = usable // share - weight - workload.overhead_bytes
    tokens, sequences = _capacity(workload, kv)
    batch = min(wanted, sequences)
    step = _step(workload, batch, 0, 0, 0, 0)
    return ServingMode(
        name="weights",
        engines=engines,
        gpus=math.ceil(engines / share),
        weight_bytes=weight,
        overhead_bytes=workload.overhead_bytes,
        kv_bytes=max(kv, 0),
        kv_tokens=tokens,
        sequences=sequences,
        batch=batch,
        step=step,
        prefill_s=_prefill_s(workload, workload.prompt_tokens),
        # Engines that share a GPU share its bandwidth, so a GPU decodes what one engine would.
        tokens_per_s=_rate(workload, batch, step, _compute_s(workload, workload.prompt_tokens)),
    )


def _slotted(
    workload: Workload,
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
    shape, d = workload.shape, workload.dtype_bytes
    bucket = rank_bucket(rank)
    slot = slot_bytes(shape, targets, bucket, d)
    slots = workload.device_slots
    weight = shape.parameters * d
    usable = int(workload.gpu.memory_bytes * workload.utilization)
    kv = usable - weight - vector - gains - slots * slot - workload.overhead_bytes
    tokens, sequences = _capacity(workload, kv)
    batch = min(workload.concurrency, sequences)
    active = min(workload.active_tenants, slots, batch)
    launches += shape.layers * len(wrapped(shape, targets)) * LORA_LAUNCHES
    step = _step(workload, batch, active * slot, vector, launches, slot)
    # A server also caches the previous revision; with the gain table both share the adapter's
    # memory where only coefficients differ.
    entries = 2 * workload.held
    each = own_bytes or 2 * d
    copies = entries if name == "composed" else workload.held
    cached = min(copies, max(slots, workload.host_bytes // each))
    return ServingMode(
        name=name,
        safe=safe,
        bucket=bucket,
        weight_bytes=weight,
        vector_bytes=vector,
        slot_bytes=slots * slot,
        gain_bytes=gains,
        overhead_bytes=workload.overhead_bytes,
        kv_bytes=max(kv, 0),
        kv_tokens=tokens,
        sequences=sequences,
        batch=batch,
        step=step,
        prefill_s=_prefill_s(workload, workload.prompt_tokens),
        tokens_per_s=_rate(workload, batch, step, _compute_s(workload, workload.prompt_tokens)),
        host_adapters=max(slots, entries * cached // copies),
        host_bytes=cached * each,
        reload_s=each / workload.gpu.link_bytes_per_s,
    )


def _capacity(workload: Workload, kv_bytes: int) -> tuple[int, int]:
    """Number of tokens, and of whole sequences of prompt and output, in `kv_bytes`."""
    tokens = max(kv_bytes, 0) // workload.shape.kv_bytes_per_token(workload.dtype_bytes)
    return tokens, tokens // (workload.prompt_tokens + workload.output_tokens)


def _step(
    workload: Workload, batch: int, adapters: int, vector: int, launches: int, slot: int
) -> StepEstimate:
    """One decode step of `batch` sequences, which also reads `adapters` and `vector` bytes.

    Every token is multiplied with its own slot (`slot` bytes) and with the vector.
    """
    shape, d = workload.shape, workload.dtype_bytes
    weight = shape.read_parameters * d
    kv = batch * workload.context_tokens * shape.kv_bytes_per_token(d)
    # Two per parameter and token, two products of scores and values per head and cached token.
    flops = batch * (
        2.0 * (shape.read_parameters + (slot + vector) / d)
        + 4.0 * shape.layers * shape.heads * shape.head_dim * workload.context_tokens
    )
    moved = weight + kv + adapters + vector
    seconds = max(moved / workload.gpu.bytes_per_s, flops / workload.gpu.flops_per_s)
    return StepEstimate(
        weight, kv, adapters, vector, flops, launches, seconds + launches * workload.launch_s
    )


def _rate(workload: Workload, batch: int, step: StepEstimate, prefill_s: float) -> float:
    """Tokens per second of a full batch: for every token, its share of a step and of its prompt."""
    return batch / (step.seconds + batch / workload.output_tokens * prefill_s)


def _compute_s(workload: Workload, tokens: int) -> float:
    """Time of a prompt's products, which delays the sequences being decoded."""
    shape = workload.shape
    layers = shape.read_parameters - shape.vocab * shape.linears[0].d_in
    attention = 2.0 * shape.layers * shape.heads * shape.head_dim * tokens * tokens
    return (2.0 * layers * tokens + attention) / workload.gpu.flops_per_s


def _prefill_s(workload: Workload, tokens: int) -> float:
    """Time of a prompt alone on an idle engine: its products or reading the weights."""
    read_s = workload.shape.read_parameters * workload.dtype_bytes / workload.gpu.bytes_per_s
    return max(_compute_s(workload, tokens), read_s)
