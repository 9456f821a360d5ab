"""Simulation of one engine under Zipf-popular tenants: slots and host memory as caches.

A discrete-event model, one event per engine step, of vLLM's scheduler as far as adapters go: first
come first served; a request whose adapter exceeds the slots is passed over; a missing adapter is
loaded inside the step, while every tenant waits. Step times are the planner's. Its results are
estimates that were not compared with a measurement. Preemption and prefix caches are left out.
"""

from __future__ import annotations

import heapq
import math
import random
from bisect import bisect
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, replace
from itertools import accumulate

from benchmarks.results import percentile
from safegene_vllm.planner import Workload, plan_mode

MAX_WAITING = 3000
"""More waiting requests than this are an overload, and end the simulation."""
Request = tuple[float, int, int]
"""(arrival in seconds, tenant, output tokens)."""


@dataclass(frozen=True)
class Traffic:
    """`requests_per_s` by a Poisson process for `seconds`; tenant k has weight k^-zipf."""

    tenants: int
    zipf: float
    requests_per_s: float
    seconds: float
    prompt_tokens: int
    output_tokens: int
    seed: int = 0


@dataclass(frozen=True)
class Engine:
    """Times in seconds: of a step, and what each active slot, cached and prompt token adds to it.

    An adapter takes `slot_load_s` from host memory into a slot, and `disk_load_s` more if it is not
    among the `host_adapters` in host memory.
    """

    slots: int
    host_adapters: int
    max_sequences: int
    batched_tokens: int
    step_s: float
    active_slot_s: float
    cached_token_s: float
    prompt_token_s: float
    slot_load_s: float
    disk_load_s: float


@dataclass(frozen=True)
class Outcome:
    """Averages after the first quarter, in which caches fill.

    `slot_hits` and `host_hits` are shares of admissions and of slot misses; `reload_share` is the
    part of the engine's busy time spent on loads.
    """

    requests: int
    overloaded: bool
    slot_hits: float
    host_hits: float
    reload_share: float
    busy_share: float
    ttft_p50_s: float
    ttft_p99_s: float
    active_mean: float


def engine_of(
    workload: Workload, *, host_adapters: int, slot_load_s: float, disk_load_s: float
) -> Engine:
    """The gain table's engine of a plan, with its step time taken apart."""
    gpu, step = workload.gpu, plan_mode(workload, "gain").step
    weights_s = (step.weight_bytes + step.vector_bytes) / gpu.bytes_per_s
    kv_bytes = workload.shape.kv_bytes_per_token(workload.dtype_bytes)
    slot_bytes = plan_mode(workload, "gain").slot_bytes / workload.device_slots
    return Engine(
        slots=workload.device_slots,
        host_adapters=host_adapters,
        max_sequences=workload.concurrency,
        batched_tokens=workload.batched_tokens,
        step_s=weights_s + step.launches * workload.launch_s,
        active_slot_s=slot_bytes / gpu.bytes_per_s,
        cached_token_s=kv_bytes / gpu.bytes_per_s,
        prompt_token_s=2.0 * workload.shape.read_parameters / gpu.flops_per_s,
        slot_load_s=slot_load_s,
        disk_load_s=disk_load_s,
    )


def without_reloads(engine: Engine, tenants: int) -> Engine:
    """The same engine with every adapter in a slot, as the baseline of reloads."""
    return replace(engine, slots=tenants, host_adapters=tenants, slot_load_s=0.0, disk_load_s=0.0)


class _LruCache:
    """Least-recently-used set of at most `size` tenants."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.tenants: OrderedDict[int, None] = OrderedDict()

    def touch(self, tenant: int, pinned: Counter[int] | None = None) -> bool:
        """Whether the tenant was cached; else it replaces the oldest that is not pinned."""
        if tenant in self.tenants:
            self.tenants.move_to_end(tenant)
            return True
        if len(self.tenants) >= self.size:
            del self.tenants[next(t for t in self.tenants if not pinned or t not in pinned)]
        self.tenants[tenant] = None
        return False


def arrivals(traffic: Traffic) -> list[Request]:
    """All requests in order; output lengths are geometric with the given mean."""
    rng = random.Random(traffic.seed)
    weights = list(accumulate((k + 1) ** -traffic.zipf for k in range(traffic.tenants)))
    stop = math.log(1.0 - 1.0 / traffic.output_tokens) if traffic.output_tokens > 1 else -1e9
    found, now = [], 0.0
    while (now := now + rng.expovariate(traffic.requests_per_s)) < traffic.seconds:
        tenant = min(bisect(weights, rng.random() * weights[-1]), traffic.tenants - 1)
        found.append((now, tenant, 1 + int(math.log(1.0 - rng.random()) / stop)))
    return found


def simulate(engine: Engine, traffic: Traffic) -> Outcome:
    """Run all requests, or until an overload.

    Host memory starts full in random order, as after a start that loads every tenant once.
    """
    pending = deque(arrivals(traffic))
    begin_s, total = traffic.seconds / 4, len(pending)
    slots = _LruCache(engine.slots)
    host = _LruCache(max(engine.host_adapters, engine.slots))
    order = list(range(traffic.tenants))
    random.Random(traffic.seed + 1).shuffle(order)
    for tenant in order:
        host.touch(tenant)
    waiting: deque[Request] = deque()
    running: list[tuple[int, int, int]] = []  # (last step, tenant, tokens), a heap
    active: Counter[int] = Counter()
    now = busy_s = load_s = slot_seconds = 0.0
    steps = cached = hits = misses = host_hits = 0
    ttft: list[float] = []
    while pending or waiting or running:
        if not waiting and not running:
            now = max(now, pending[0][0])
        while pending and pending[0][0] <= now:
            waiting.append(pending.popleft())
        if len(waiting) > MAX_WAITING:
            break
        budget = engine.batched_tokens - len(running)
        loading, prompts, skipped, admitted = 0.0, 0, deque[Request](), []
        while waiting and len(running) < engine.max_sequences:
            if prompts + traffic.prompt_tokens > budget:
                break
            arrived, tenant, tokens = request = waiting.popleft()
            if tenant not in active and len(active) >= engine.slots:
                skipped.append(request)
                continue
            in_slot, in_host = slots.touch(tenant, active), host.touch(tenant)
            if not in_slot:
                loading += engine.slot_load_s + (0.0 if in_host else engine.disk_load_s)
            if arrived >= begin_s:
                hits += in_slot
                misses += not in_slot
                host_hits += in_host and not in_slot
            active[tenant] += 1
            prompts += traffic.prompt_tokens
            heapq.heappush(running, (steps + tokens, tenant, traffic.prompt_tokens + tokens))
            admitted.append(arrived)
        waiting.extendleft(reversed(skipped))
        cached += prompts
        step_s = engine.step_s + len(active) * engine.active_slot_s
        step_s += cached * engine.cached_token_s + prompts * engine.prompt_token_s + loading
        now += step_s
        if now >= begin_s:
            busy_s, load_s = busy_s + step_s, load_s + loading
            slot_seconds += len(active) * step_s
        steps += 1
        cached += len(running)
        ttft += [now - arrived for arrived in admitted if arrived >= begin_s]
        while running and running[0][0] <= steps:
            _, tenant, length = heapq.heappop(running)
            cached -= length
            active[tenant] -= 1
            if not active[tenant]:
                del active[tenant]
    return Outcome(
        requests=total,
        overloaded=len(waiting) > MAX_WAITING,
        slot_hits=hits / (hits + misses) if hits + misses else 0.0,
        host_hits=host_hits / misses if misses else 1.0,
        reload_share=load_s / busy_s if busy_s else 0.0,
        busy_share=busy_s / (now - begin_s) if now > begin_s else 0.0,
        ttft_p50_s=percentile(ttft, 0.50),
        ttft_p99_s=percentile(ttft, 0.99),
        active_mean=slot_seconds / busy_s if busy_s else 0.0,
    )
