"""Measurement of one cell: engines started in turn, loaded in interleaved rounds, stopped.

All engines of a cell are alive together; the CPU time of the idle ones is part of every result.
Complete rounds are cached on disk, so that an interrupted run continues. One folder per commit,
versions and machine holds one folder per cell and settings: numbers of different code, machines or
settings never meet.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.serving.arms import REQUEST_KINDS, Arm
from benchmarks.serving.artifacts import Artifacts
from benchmarks.serving.cells import Cell, Load
from benchmarks.serving.load import Wrap, filler, guarded, prefixed, run_load
from benchmarks.serving.server import (
    BASE,
    BenchError,
    Server,
    off_worker_cores,
    pin_processes,
    slot_bytes,
)
from safegene_vllm.formats.file_io import read_json, replace_file

ENGINE_BYTES = 2 << 30
"""Memory of one engine's processes besides weights, slots and KV cache."""
SETTLE_S = 2.0
"""Pause between two runs: a worker of vLLM spins on its core for a second after its last step."""
TIMED_ROUNDS, TIMED_WAVES, TIMED_OUTPUT_TOKENS = 6, 12, 16
"""Rounds followed by timed steps; their requests per concurrent one and output tokens."""

Round = Mapping[str, Mapping[str, float | None]]
"""One round's metrics by arm name."""


@dataclass(frozen=True)
class ResultCache:
    """Rounds of one commit on one machine below `root`.

    A round is stored complete or not at all: its ratios need all arms next to each other.
    """

    root: Path
    provenance: Mapping[str, Any]

    def folder(self, cell: Cell) -> Path:
        text = json.dumps(dict(self.provenance), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        name = f"{self.provenance['commit']}-{digest}"
        return self.root / name / f"{cell.name}-{cell.digest}"

    def clear(self, cell: Cell) -> None:
        shutil.rmtree(self.folder(cell), ignore_errors=True)

    def write(self, cell: Cell, kind: str, number: int, found: Round) -> None:
        """Store one `round`, one turn of `start`s or what was measured `after` all rounds."""
        path = self.folder(cell) / f"{kind}-{number:03d}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(found, indent=1).encode())

    def read(self, cell: Cell, kind: str = "round") -> dict[int, Round]:
        """Stored values by number, of those that contain every arm of the cell."""
        found: dict[int, Round] = {}
        for path in sorted(self.folder(cell).glob(f"{kind}-*.json")):
            arms: Round = read_json(path)
            if all(arm.name in arms for arm in cell.arms):
                found[int(path.stem.rpartition("-")[2])] = arms
        return found

    def missing(self, cell: Cell, count: int) -> list[int]:
        """Numbers of the rounds that are still to be measured."""
        done = self.read(cell)
        return [number for number in range(count) if number not in done]


@dataclass(frozen=True)
class Bench:
    """Paths, device and number of rounds, equal for every cell."""

    model: Path
    artifacts_root: Path
    cache: ResultCache
    rounds: int
    threads: int
    on_cpu: bool
    log: Callable[[str], None]
    settle_s: float = SETTLE_S

    def is_done(self, cell: Cell) -> bool:
        cache = self.cache
        complete = not cache.missing(cell, self.rounds) and cache.read(cell, "after")
        return bool(complete) and len(cache.read(cell, "start")) >= cell.starts

    def run(self, server: Server, load: Load, seed: int, wrap: Wrap | None) -> dict[str, float]:
        """Run one load, after a pause and off the worker's cores."""
        time.sleep(self.settle_s)
        tenants = [f"t{i}" for i in range(server.cell.tenants)] if server.arm.has_tenants else []
        with off_worker_cores(self.threads) if self.on_cpu else nullcontext():
            return run_load(server.url, self.model, load, tenants, seed, wrap=wrap)


def prompt_seed(cell: Cell, number: int, arm: Arm) -> int:
    """Seed of a round's prompts: equal for all arms with an engine of their own.

    Arms on a shared engine get other prompts, so that none of them finds cached prefixes.
    """
    own = arm.name if arm.shares_engine else ""
    return zlib.crc32(f"{cell.name}/{number}/{own}".encode()) % (1 << 31)


def round_order(arms: Sequence[Arm], number: int) -> list[Arm]:
    """Forwards in even rounds, backwards in odd ones, so that drift affects all arms alike."""
    return list(arms) if number % 2 == 0 else list(reversed(arms))


def measure(bench: Bench, cell: Cell, on_run: Callable[[], Any] = lambda: None) -> None:
    """Measure and cache what is missing of `cell`; `on_run` is called after every run.

    Raises: BenchError; complete rounds stay cached.
    """
    if bench.is_done(cell):
        return
    wraps = _request_wraps(bench, cell)
    with _running(bench, cell) as servers:

        def run(arm: Arm, number: int, load: Load) -> dict[str, float]:
            server = servers[arm.engine(bench.on_cpu)]
            server.switch(arm.worker_state)
            return bench.run(server, load, prompt_seed(cell, number, arm), wraps.get(arm.kind))

        enough = max(cell.tenants, cell.load.concurrency)
        warm_up = replace(cell.load, requests=min(cell.load.requests, enough))
        for arm in cell.arms:
            run(arm, -1, warm_up)
        for number in bench.cache.missing(cell, bench.rounds):
            found: dict[str, dict[str, float]] = {}
            for arm in round_order(cell.arms, number):
                bench.log(f"{cell.name}: round {number + 1} of {bench.rounds}, {arm.title}")
                found[arm.name] = run(arm, number, cell.load)
                on_run()
            for arm in cell.arms if cell.in_turns and number < TIMED_ROUNDS else ():
                if arm.kind == "aside":
                    bench.log(f"{cell.name}: round {number + 1}, timed steps, {arm.title}")
                    engine = arm.engine(bench.on_cpu)
                    steps = timed_steps(bench, cell, servers[engine], number)
                    found[engine.name] |= steps["all"]
                    found[arm.name] |= steps["aside"]
            bench.cache.write(cell, "round", number, found)
        after = {arm.name: dict[str, float]() for arm in cell.arms}
        bench.cache.write(
            cell, "after", 0, after | {a.name: s.memory() for a, s in servers.items()}
        )


def timed_steps(
    bench: Bench, cell: Cell, server: Server, number: int
) -> dict[str, dict[str, float]]:
    """A longer run of short completions in which the worker switches between its steps.

    Between two runs the machine itself varies more than safety costs; between two steps not.
    """
    requests = TIMED_WAVES * cell.load.concurrency
    load = replace(cell.load, requests=requests, output_tokens=TIMED_OUTPUT_TOKENS)
    server.switch("all")
    server.call_worker("start_timed_steps")
    try:
        # No other run has these prompts.
        seed = prompt_seed(cell, bench.rounds + number, Arm("aside", server.arm.layers))
        bench.run(server, load, seed, None)
    finally:
        steps: dict[str, dict[str, float]] = server.call_worker("end_timed_steps")
    return steps


def _request_wraps(bench: Bench, cell: Cell) -> dict[str, Wrap]:
    if not any(arm.kind in REQUEST_KINDS for arm in cell.arms):
        return {}
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(bench.model))
    template = filler(tokenizer, cell.load.guard_tokens)
    system_prompt = filler(tokenizer, cell.load.system_tokens, start=17)
    return {"guard": guarded(template, BASE), "system_prompt": prefixed(system_prompt)}


@contextmanager
def _running(bench: Bench, cell: Cell) -> Iterator[dict[Arm, Server]]:
    """Start the cell's engines one after the other, in `cell.starts` turns; each turn is cached.

    Raises: BenchError if an engine does not start or memory does not suffice.
    """
    artifacts = Artifacts(bench.artifacts_root, bench.model, cell.rank, cell.vector_rank)
    servers = dict[Arm, Server]()
    needed = ENGINE_BYTES + artifacts.model_bytes
    needed += int(cell.engine.get("kv-cache-memory-bytes", 0))
    try:
        done = len(bench.cache.read(cell, "start"))
        for turn in range(done, max(cell.starts, done + 1)):
            found: dict[str, dict[str, float]] = {arm.name: {} for arm in cell.arms}
            for arm in round_order([a for a in cell.arms if not a.shares_engine], turn):
                if arm in servers:
                    servers.pop(arm).stop()
                most = needed + 2 * slot_bytes(arm, cell, artifacts)
                free = psutil.virtual_memory().available
                if bench.on_cpu and free < most:
                    raise BenchError(
                        f"{cell.name}: {arm.name} may need {most >> 20} MiB and {free >> 20} are "
                        "free; use fewer tenants, smaller ranks or fewer arms"
                    )
                log = bench.cache.folder(cell) / f"{arm.name}.log"
                server = servers[arm] = Server(arm, cell, artifacts, bench.threads, log)
                bench.log(f"{cell.name}: starting {arm.title}")
                found[arm.name] = server.start()
                if bench.on_cpu:
                    pin_processes(server.processes(), bench.threads)
            bench.cache.write(cell, "start", turn, found)
        yield servers
    finally:
        for server in servers.values():
            server.stop()
