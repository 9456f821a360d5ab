"""One cell measured: its engines started in turn, asked in interleaved rounds, stopped.

All engines of a cell are alive together and take turns; what the idle ones use of the CPU is part
of every result. Every round is kept as soon as it is whole.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from arms import RIDERS, Arm
from cells import Cell
from changing import changes, restarted
from kept import Kept
from launching import BASE, BenchError, Server, safety_bytes, slot_rank
from loadgen import Wrap, ask
from placing import beside, place
from random_world import World
from riding import filler, guarded, prefixed

ENGINE_BYTES = 2 << 30
"""Room for one engine's processes beside weights, slots and cache."""
IDLE_SHARE = 0.05
"""More than this of one core used by idle engines is told."""
SETTLE_S = 2.0
"""Between two runs: a worker of vLLM's spins on its core for a second after its last step."""
WARM = -1
TURNS_ROUNDS, TURNS_WAVES, TURNS_OUTPUT = 6, 12, 16
"""After how many rounds steps take turns; requests per concurrent one and tokens of an answer."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Bench:
    """What every cell needs: where things are, on what device, how many rounds."""

    model: Path
    worlds: Path
    kept: Kept
    rounds: int
    threads: int
    on_cpu: bool
    say: Say
    settle_s: float = SETTLE_S

    def world(self, cell: Cell) -> World:
        return World(self.worlds, self.model, cell.rank, cell.vector_rank)


def seed(cell: Cell, number: int, arm: Arm) -> int:
    """The seed of a round's prompts: the same for all arms with an engine of their own.

    Riders share an engine with another arm, whose cached prompts must not help them.
    """
    rider = arm.name if arm.rides else ""
    return zlib.crc32(f"{cell.name}/{number}/{rider}".encode()) % (1 << 31)


def order(arms: Sequence[Arm], number: int) -> list[Arm]:
    """Forwards in even rounds, backwards in odd ones: drift falls on all alike."""
    return list(arms) if number % 2 == 0 else list(reversed(arms))


def room_needed(cell: Cell, arm: Arm, world: World) -> int:
    """Bytes that one more engine may take."""
    width = sum(d_out + d_in for d_out, d_in in world.sites.values())
    slots = 4 * cell.tenants * slot_rank(arm, cell) * width if arm.has_tenants else 0
    cache = int(cell.engine.get("kv-cache-memory-bytes", 0))
    return int(ENGINE_BYTES + world.model_bytes + slots + cache)


def _wraps(bench: Bench, cell: Cell) -> Mapping[str, Wrap | None]:
    """What is put around the requests of riders; their texts are always the same."""
    if not any(arm.kind in RIDERS for arm in cell.arms):
        return {}
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(bench.model))
    template = filler(tokenizer, cell.load.guard_tokens)
    system = filler(tokenizer, cell.load.system_tokens, start=17)
    return {"guard": guarded(template, BASE), "system_prompt": prefixed(system)}


@contextmanager
def running(bench: Bench, cell: Cell) -> Iterator[dict[Arm, Server]]:
    """The cell's engines, started one after the other; each turn of starts is kept.

    Errors: BenchError if one does not start, or there is no memory for it.
    """
    world = bench.world(cell)
    servers: dict[Arm, Server] = {}
    try:
        done = len(bench.kept.read(cell, "start"))
        for turn in range(done, max(cell.starts, done + 1)):
            found: dict[str, dict[str, float]] = {arm.name: {} for arm in cell.arms}
            for arm in order([a for a in cell.arms if not a.rides], turn):
                if arm in servers:
                    servers.pop(arm).stop()
                needed, free = room_needed(cell, arm, world), psutil.virtual_memory().available
                if bench.on_cpu and free < needed:
                    raise BenchError(
                        f"{cell.name}: {arm.name} may need {needed >> 20} MiB and {free >> 20} are "
                        "free; ask for fewer tenants, smaller ranks or fewer arms"
                    )
                log = bench.kept.place(cell) / f"{arm.name}.log"
                server = Server(arm, cell, world, bench.threads, log)
                bench.say(f"{cell.name}: starting {arm.title}")
                found[arm.name] = server.start()
                if bench.on_cpu:
                    place(server.processes(), bench.threads)
                servers[arm] = server
            bench.kept.write(cell, "start", turn, found)
        yield servers
    finally:
        for server in servers.values():
            server.stop()


def _asked(
    bench: Bench,
    cell: Cell,
    servers: Mapping[Arm, Server],
    arm: Arm,
    number: int,
    wrap: Wrap | None,
) -> dict[str, float]:
    """One arm's numbers of one round, with the share of a core that the idle engines used."""
    server = servers[arm.engine(bench.on_cpu)]
    others = [other for other in servers.values() if other is not server]
    tenants = [f"t{i}" for i in range(cell.tenants)] if server.arm.has_tenants else []
    load = cell.load
    if number == WARM:
        few = max(len(tenants), load.concurrency)
        load = replace(load, requests=min(load.requests, few))
    server.switch(arm.safety)
    time.sleep(bench.settle_s)
    before = sum(other.cpu_s() for other in others)
    tokenizer, at = bench.model, seed(cell, number, arm)
    with beside(bench.threads) if bench.on_cpu else nullcontext():
        found = ask(server.url, tokenizer, load, tenants, at, wrap=wrap)
    idle = (sum(other.cpu_s() for other in others) - before) / found["duration_s"]
    if idle > IDLE_SHARE and number != WARM:
        bench.say(f"{cell.name}: idle engines used {idle:.0%} of a core beside {arm.name}")
    return found | {"idle_cpu_share": idle}


def _in_turns(bench: Bench, cell: Cell, server: Server, at: int) -> dict[str, Any]:
    """A longer run of short answers in which the worker switches between its steps, and times them.

    Between two runs the machine itself changes by more than safety costs; between two steps not.
    """
    tenants = [f"t{i}" for i in range(cell.tenants)]
    requests = TURNS_WAVES * cell.load.concurrency
    load = replace(cell.load, requests=requests, output_tokens=TURNS_OUTPUT)
    server.switch("all")
    time.sleep(bench.settle_s)
    server.tell("take_turns")
    try:
        with beside(bench.threads) if bench.on_cpu else nullcontext():
            ask(server.url, bench.model, load, tenants, at)
    finally:
        told: dict[str, Any] = server.tell("end_turns")
    return told


def is_done(bench: Bench, cell: Cell) -> bool:
    kept = bench.kept
    whole = not kept.missing(cell, "round", bench.rounds) and kept.read(cell, "after")
    return bool(whole) and len(kept.read(cell, "start")) >= cell.starts


def measure(bench: Bench, cell: Cell, done: Callable[[], Any] = lambda: None) -> None:
    """Measure what is missing of `cell` and keep it; `done` is called after every run.

    Errors: BenchError; whole rounds stay kept.
    """
    if is_done(bench, cell):
        return
    wraps = _wraps(bench, cell)
    with running(bench, cell) as servers:
        for arm in cell.arms:
            _asked(bench, cell, servers, arm, WARM, wraps.get(arm.kind))
        for number in bench.kept.missing(cell, "round", bench.rounds):
            found = {}
            for arm in order(cell.arms, number):
                bench.say(f"{cell.name}: round {number + 1} of {bench.rounds}, {arm.title}")
                found[arm.name] = _asked(bench, cell, servers, arm, number, wraps.get(arm.kind))
                done()
            for arm in cell.arms if cell.in_turns and number < TURNS_ROUNDS else ():
                if arm.safety == "aside":
                    bench.say(f"{cell.name}: round {number + 1}, steps in turn, {arm.title}")
                    engine = arm.engine(bench.on_cpu)
                    at = seed(cell, bench.rounds + number, arm)  # prompts of no other run
                    told = _in_turns(bench, cell, servers[engine], at)
                    found[engine.name] |= told["all"]
                    found[arm.name] |= told["aside"]
            bench.kept.write(cell, "round", number, found)
        bench.kept.write(cell, "after", 0, _after(bench, cell, servers))


def _after(bench: Bench, cell: Cell, servers: Mapping[Arm, Server]) -> dict[str, dict[str, float]]:
    """Memory after the rounds, bytes of safety, load and change latency; nothing of riders."""
    found: dict[str, dict[str, float]] = {arm.name: {} for arm in cell.arms}
    starts = list(bench.kept.read(cell, "start").values())[-1]
    for arm, server in servers.items():
        bench.say(f"{cell.name}: loads and changes, {arm.title}")
        server.switch("all")
        numbers = server.memory() | safety_bytes(server)
        numbers |= changes(server, cell.changes)
        found[arm.name] = numbers | restarted(server, starts[arm.name]["start_s"] or 0.0)
    return found
