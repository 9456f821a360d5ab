"""One engine under Zipf-popular tenants: slots and host memory as caches, reloads in the step.

For what a thousand tenants on one GPU mean. A discrete-event model, one event per engine step, of
vLLM's scheduler as far as adapters go: first come first served, a request whose adapter would be
one too many for the slots is passed over, and a missing adapter is loaded inside the step, while
everybody waits. Step times are the planner's. Not for tokens, preemption or prefix caches.
"""

from __future__ import annotations

import heapq
import math
import random
from bisect import bisect
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, replace
from itertools import accumulate

from safegene_vllm.planner import Workload, plan_mode

GIVE_UP = 3000
"""So many waiting requests are an overload; what follows would only be a longer queue."""


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
    """Times in seconds: a step is `step_s` plus what each active slot, cached token and prompt
    token adds; an adapter takes `slot_load_s` from host memory into a slot, and `disk_load_s` more
    if it is not in host memory, which keeps `host_adapters`.
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
    """What came after the first quarter, in which caches fill. `slot_hits` and `host_hits` are
    shares of admissions and of slot misses. `reload_share` is the part of the engine's busy time
    that loads took. Times to first token in seconds.
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
    ask: Workload, *, host_adapters: int, slot_load_s: float, disk_load_s: float
) -> Engine:
    """The gain table's engine of a plan, its step taken apart."""
    shape, gpu, d = ask.shape, ask.gpu, ask.dtype_bytes
    mode = plan_mode(ask, "gain")
    step = mode.step
    fixed = (step.weight_bytes + step.vector_bytes) / gpu.bytes_per_s + step.launches * ask.launch_s
    return Engine(
        slots=ask.device_slots,
        host_adapters=host_adapters,
        max_sequences=ask.concurrency,
        batched_tokens=ask.batched_tokens,
        step_s=fixed,
        active_slot_s=mode.slot_bytes / ask.device_slots / gpu.bytes_per_s,
        cached_token_s=shape.kv_bytes_per_token(d) / gpu.bytes_per_s,
        prompt_token_s=2.0 * shape.read_parameters / gpu.flops_per_s,
        slot_load_s=slot_load_s,
        disk_load_s=disk_load_s,
    )


def without_reloads(engine: Engine, tenants: int) -> Engine:
    """The same engine with every adapter in a slot, for what reloads add."""
    return replace(engine, slots=tenants, host_adapters=tenants, slot_load_s=0.0, disk_load_s=0.0)


class _Kept:
    """A least-recently-used set of at most `room` names."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.names: OrderedDict[int, None] = OrderedDict()

    def touch(self, name: int, busy: Counter[int] | None = None) -> bool:
        """Whether it was there; if not, it takes the place of the oldest that is not busy."""
        if name in self.names:
            self.names.move_to_end(name)
            return True
        if len(self.names) >= self.room:
            oldest = next(n for n in self.names if busy is None or n not in busy)
            del self.names[oldest]
        self.names[name] = None
        return False


def arrivals(traffic: Traffic) -> list[tuple[float, int, int]]:
    """(moment, tenant, output tokens) in order; outputs are geometric with the given mean."""
    chance = random.Random(traffic.seed)
    weights = list(accumulate((k + 1) ** -traffic.zipf for k in range(traffic.tenants)))
    found, now = [], 0.0
    while (now := now + chance.expovariate(traffic.requests_per_s)) < traffic.seconds:
        tenant = bisect(weights, chance.random() * weights[-1])
        stop = math.log(1.0 - 1.0 / traffic.output_tokens) if traffic.output_tokens > 1 else -1e9
        tokens = 1 + int(math.log(1.0 - chance.random()) / stop)
        found.append((now, min(tenant, traffic.tenants - 1), tokens))
    return found


def simulate(engine: Engine, traffic: Traffic) -> Outcome:
    """Run all arrivals to their first token, or to an overload.

    Host memory begins full, as after a start that loads every tenant once, in no order of use.
    """
    coming = deque(arrivals(traffic))
    begin_s = traffic.seconds / 4
    total = len(coming)
    waiting: deque[tuple[float, int, int]] = deque()
    slots, host = _Kept(engine.slots), _Kept(max(engine.host_adapters, engine.slots))
    order = list(range(traffic.tenants))
    random.Random(traffic.seed + 1).shuffle(order)
    for tenant in order:
        host.touch(tenant)
    ends: list[tuple[int, int, int]] = []
    active: Counter[int] = Counter()
    now = busy_s = load_s = area = 0.0
    steps = cached = hits = misses = host_hits = 0
    first: list[float] = []
    while coming or waiting or ends:
        if not waiting and not ends:
            now = max(now, coming[0][0])
        while coming and coming[0][0] <= now:
            waiting.append(coming.popleft())
        if len(waiting) > GIVE_UP:
            break
        budget = engine.batched_tokens - len(ends)
        loading, prompts, kept, fresh = 0.0, 0, deque[tuple[float, int, int]](), []
        while waiting:
            moment, tenant, tokens = waiting[0]
            if len(ends) >= engine.max_sequences or prompts + traffic.prompt_tokens > budget:
                break
            waiting.popleft()
            if tenant not in active and len(active) >= engine.slots:
                kept.append((moment, tenant, tokens))
                continue
            counts = moment >= begin_s
            here, near = slots.touch(tenant, active), host.touch(tenant)
            if not here:
                loading += engine.slot_load_s + (0.0 if near else engine.disk_load_s)
            hits += counts and here
            misses += counts and not here
            host_hits += counts and near and not here
            active[tenant] += 1
            prompts += traffic.prompt_tokens
            cached += traffic.prompt_tokens
            heapq.heappush(ends, (steps + tokens, tenant, traffic.prompt_tokens + tokens))
            fresh.append(moment)
        waiting.extendleft(reversed(kept))
        running = len(active)
        took = engine.step_s + running * engine.active_slot_s + cached * engine.cached_token_s
        took += prompts * engine.prompt_token_s + loading
        now += took
        if now >= begin_s:
            busy_s, load_s, area = busy_s + took, load_s + loading, area + running * took
        steps += 1
        cached += len(ends)
        first += [now - moment for moment in fresh if moment >= begin_s]
        while ends and ends[0][0] <= steps:
            _, tenant, length = heapq.heappop(ends)
            cached -= length
            active[tenant] -= 1
            if not active[tenant]:
                del active[tenant]
    first.sort()
    asked = hits + misses
    return Outcome(
        requests=total,
        overloaded=len(waiting) > GIVE_UP,
        slot_hits=hits / asked if asked else 0.0,
        host_hits=host_hits / misses if misses else 1.0,
        reload_share=load_s / busy_s if busy_s else 0.0,
        busy_share=busy_s / (now - begin_s) if now > begin_s else 0.0,
        ttft_p50_s=_at(first, 0.50),
        ttft_p99_s=_at(first, 0.99),
        active_mean=area / busy_s if busy_s else 0.0,
    )


def _at(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
