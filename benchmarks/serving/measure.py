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
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil

from benchmarks.serving.arms import OFFLINE, REQUEST_KINDS, Arm
from benchmarks.serving.artifacts import Artifacts
from benchmarks.serving.cells import Cell
from benchmarks.serving.load import Wrap, filler, guarded, prefixed, run_load
from benchmarks.serving.server import (
    BASE,
    BenchError,
    Server,
    off_worker_cores,
    pin_processes,
    slot_bytes,
    tenant_path,
)
from safegene_vllm.formats.file_io import read_json, replace_file

ENGINE_BYTES = 2 << 30
"""Memory of one engine's processes besides weights, slots and KV cache."""
IDLE_SHARE = 0.05
"""Idle engines that use more than this share of a core are reported."""
SETTLE_S = 2.0
"""Pause between two runs: a worker of vLLM spins on its core for a second after its last step."""
WARM_UP = -1
TIMED_ROUNDS, TIMED_WAVES, TIMED_OUTPUT_TOKENS = 6, 12, 16
"""Rounds followed by timed steps; their requests per concurrent one and output tokens."""
UNUSED_PROFILE = 5000
"""Profiles from this number on belong to no tenant until one is changed."""

Metrics = Mapping[str, float | None]
Round = Mapping[str, Metrics]
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
        data = {"arms": {arm: dict(metrics) for arm, metrics in found.items()}}
        replace_file(path, json.dumps(data, indent=1).encode())

    def read(self, cell: Cell, kind: str) -> dict[int, Round]:
        """Stored values by number, of those that contain every arm of the cell."""
        found: dict[int, Round] = {}
        for path in sorted(self.folder(cell).glob(f"{kind}-*.json")):
            arms: Round = read_json(path)["arms"]
            if all(arm.name in arms for arm in cell.arms):
                found[int(path.stem.rpartition("-")[2])] = arms
        return found

    def rounds(self, cell: Cell, kind: str = "round") -> Sequence[Round]:
        return list(self.read(cell, kind).values())

    def missing(self, cell: Cell, count: int) -> list[int]:
        """Numbers of the rounds that are still to be measured."""
        done = self.read(cell, "round")
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

    def artifacts(self, cell: Cell) -> Artifacts:
        return Artifacts(self.artifacts_root, self.model, cell.rank, cell.vector_rank)

    def is_done(self, cell: Cell) -> bool:
        cache = self.cache
        complete = not cache.missing(cell, self.rounds) and cache.read(cell, "after")
        return bool(complete) and len(cache.read(cell, "start")) >= cell.starts


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
        run = _Runs(bench, cell, servers, wraps)
        for arm in cell.arms:
            run.load(arm, WARM_UP)
        for number in bench.cache.missing(cell, bench.rounds):
            found: dict[str, dict[str, float]] = {}
            for arm in round_order(cell.arms, number):
                bench.log(f"{cell.name}: round {number + 1} of {bench.rounds}, {arm.title}")
                found[arm.name] = run.load(arm, number)
                on_run()
            for arm in cell.arms if cell.in_turns and number < TIMED_ROUNDS else ():
                if arm.kind == "aside":
                    bench.log(f"{cell.name}: round {number + 1}, timed steps, {arm.title}")
                    steps = run.timed_steps(arm, number)
                    found[arm.engine(bench.on_cpu).name] |= steps["all"]
                    found[arm.name] |= steps["aside"]
            bench.cache.write(cell, "round", number, found)
        bench.cache.write(cell, "after", 0, _after_rounds(bench, cell, servers))


@dataclass(frozen=True)
class _Runs:
    bench: Bench
    cell: Cell
    servers: Mapping[Arm, Server]
    wraps: Mapping[str, Wrap]

    def load(self, arm: Arm, number: int) -> dict[str, float]:
        """One run's metrics, with the share of a core that the idle engines used meanwhile."""
        bench, load = self.bench, self.cell.load
        server = self.servers[arm.engine(bench.on_cpu)]
        idle = [other for other in self.servers.values() if other is not server]
        tenants = [f"t{i}" for i in range(self.cell.tenants)] if server.arm.has_tenants else []
        if number == WARM_UP:
            enough = max(len(tenants), load.concurrency)
            load = replace(load, requests=min(load.requests, enough))
        server.switch(arm.worker_state)
        time.sleep(bench.settle_s)
        before = sum(other.cpu_s() for other in idle)
        seed = prompt_seed(self.cell, number, arm)
        with self._cores():
            wrap = self.wraps.get(arm.kind)
            found = run_load(server.url, bench.model, load, tenants, seed, wrap=wrap)
        share = (sum(other.cpu_s() for other in idle) - before) / found["duration_s"]
        if share > IDLE_SHARE and number != WARM_UP:
            bench.log(f"{self.cell.name}: idle engines used {share:.0%} of a core ({arm.name})")
        return found | {"idle_cpu_share": share}

    def timed_steps(self, arm: Arm, number: int) -> dict[str, dict[str, float]]:
        """A longer run of short completions in which the worker switches between its steps.

        Between two runs the machine itself varies more than safety costs; between two steps not.
        """
        bench, load = self.bench, self.cell.load
        server = self.servers[arm.engine(bench.on_cpu)]
        load = replace(
            load,
            requests=TIMED_WAVES * load.concurrency,
            output_tokens=TIMED_OUTPUT_TOKENS,
        )
        server.switch("all")
        time.sleep(bench.settle_s)
        server.call_worker("start_timed_steps")
        tenants = [f"t{i}" for i in range(self.cell.tenants)]
        seed = prompt_seed(self.cell, bench.rounds + number, arm)  # no other run's prompts
        try:
            with self._cores():
                run_load(server.url, bench.model, load, tenants, seed)
        finally:
            steps: dict[str, dict[str, float]] = server.call_worker("end_timed_steps")
        return steps

    def _cores(self) -> Any:
        return off_worker_cores(self.bench.threads) if self.bench.on_cpu else nullcontext()


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
    artifacts, servers = bench.artifacts(cell), dict[Arm, Server]()
    kv_cache_bytes = int(cell.engine.get("kv-cache-memory-bytes", 0))
    try:
        done = len(bench.cache.read(cell, "start"))
        for turn in range(done, max(cell.starts, done + 1)):
            found: dict[str, dict[str, float]] = {arm.name: {} for arm in cell.arms}
            for arm in round_order([a for a in cell.arms if not a.shares_engine], turn):
                if arm in servers:
                    servers.pop(arm).stop()
                needed = ENGINE_BYTES + artifacts.model_bytes + kv_cache_bytes
                needed += 2 * slot_bytes(arm, cell, artifacts)
                free = psutil.virtual_memory().available
                if bench.on_cpu and free < needed:
                    raise BenchError(
                        f"{cell.name}: {arm.name} may need {needed >> 20} MiB and {free >> 20} are "
                        "free; use fewer tenants, smaller ranks or fewer arms"
                    )
                log = bench.cache.folder(cell) / f"{arm.name}.log"
                server = Server(arm, cell, artifacts, bench.threads, log)
                bench.log(f"{cell.name}: starting {arm.title}")
                found[arm.name] = server.start()
                if bench.on_cpu:
                    pin_processes(server.processes(), bench.threads)
                servers[arm] = server
            bench.cache.write(cell, "start", turn, found)
        yield servers
    finally:
        for server in servers.values():
            server.stop()


def _after_rounds(
    bench: Bench, cell: Cell, servers: Mapping[Arm, Server]
) -> dict[str, dict[str, float]]:
    """Memory, and latency of loads and changes; empty for arms without an engine of their own."""
    found: dict[str, dict[str, float]] = {arm.name: {} for arm in cell.arms}
    starts = bench.cache.rounds(cell, "start")[-1]
    for arm, server in servers.items():
        bench.log(f"{cell.name}: loads and changes, {arm.title}")
        server.switch("all")
        found[arm.name] = server.memory() | change_latency(server, cell.changes)
        found[arm.name] |= restart_latency(server, starts[arm.name]["start_s"] or 0.0)
    return found


def change_latency(server: Server, count: int) -> dict[str, float]:
    """Medians of `count` loads of a new tenant (`load_s`) and changes of one (`change_s`).

    By vLLM's own load route on an idle server. It responds when the engine holds the adapter, under
    SafeGene when every worker's receipt agrees too. Adapters merged offline are exported first.
    """
    arm, artifacts, first = server.arm, server.artifacts, server.cell.tenants
    if not arm.has_tenants or not count:
        return {}
    # Files are written before the clock starts.
    paths = [tenant_path(artifacts, arm, n, n) for n in range(first, first + count)]
    found = {"load_s": median(_load_s(server, f"new-{n}", p) for n, p in enumerate(paths))}
    if arm.kind not in ("gain", "composed", *OFFLINE):
        return found
    seconds = []
    for number in range(UNUSED_PROFILE, UNUSED_PROFILE + count):
        artifacts.protected(0, arm.layers, number)
        with tempfile.TemporaryDirectory(dir=artifacts.root) as folder:
            path, started = Path(folder) / "t0", time.perf_counter()
            if arm.kind in OFFLINE:
                artifacts.export(0, arm.layers, number, path)
            else:
                path = artifacts.protected(0, arm.layers, number)
            exported_s = time.perf_counter() - started if arm.kind in OFFLINE else 0.0
            seconds.append(exported_s + _load_s(server, f"t0-changed-{number}", path))
    return found | {"change_s": median(seconds)}


def restart_latency(server: Server, start_s: float) -> dict[str, float]:
    """`change_s` of arms that need a new process: with `merged` the export and the start."""
    if server.arm.kind == "weights":
        return {"change_s": start_s}
    if server.arm.kind != "merged":
        return {}
    with tempfile.TemporaryDirectory(dir=server.artifacts.root) as folder:
        started = time.perf_counter()
        server.artifacts.export_merged(server.arm.layers, Path(folder) / "merged")
        return {"change_s": time.perf_counter() - started + start_s}


def _load_s(server: Server, name: str, path: Path) -> float:
    """Seconds until the adapter at `path` is served as `name`; it is unloaded again."""

    def post(route: str, body: dict[str, str]) -> None:
        response = httpx.post(f"{server.url}/v1/{route}", json=body, timeout=300)
        if response.status_code != 200:
            raise BenchError(f"{route}: status {response.status_code}: {response.text[:500]}")

    started = time.perf_counter()
    post("load_lora_adapter", {"lora_name": name, "lora_path": str(path)})
    seconds = time.perf_counter() - started
    post("unload_lora_adapter", {"lora_name": name})
    return seconds
