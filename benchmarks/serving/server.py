"""Servers of the benchmark: one child process per arm, its cores and memory.

All arms get the same engine flags. Stock arms run without any plugin, the others through
`safegene serve`, as a user would start them.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.results import ROOT
from benchmarks.serving.arms import OFFLINE, PLUGIN, PROTECTED, Arm
from benchmarks.serving.artifacts import Artifacts
from benchmarks.serving.cells import Cell
from safegene_vllm.errors import SafegeneError
from safegene_vllm.planner.slots import rank_bucket

API_SERVER = "vllm.entrypoints.openai.api_server"
BASE = "base"
"""Served name of the base model."""
SWITCH = "benchmarks.serving.worker_switch.Switch"
"""Worker extension of an engine that several arms share."""
WORKER = "VLLM::Worker"
"""vLLM's name of the process that computes."""
START_LIMIT_S = 600.0
STOP_LIMIT_S = 60.0


class BenchError(SafegeneError):
    """A server or a measurement failed; no result is reported."""


def tenant_path(artifacts: Artifacts, arm: Arm, tenant: int) -> Path:
    """The directory that `arm` serves as this tenant, with a profile of its own if it has one."""
    if arm.kind in ("gain", "composed"):
        return artifacts.protected(tenant, arm.layers, tenant)
    if arm.kind in OFFLINE:
        return artifacts.exported(tenant, arm.layers, tenant)
    return artifacts.plain(tenant)


def is_switched(arm: Arm, cell: Cell) -> bool:
    """Whether other arms of the cell share this arm's engine in another worker state."""
    return any(o.worker_state != "all" and o.engine(on_cpu=True) == arm for o in cell.arms)


def slot_rank(arm: Arm, cell: Cell) -> int:
    """The rank bucket of the arm's LoRA slots."""
    composed = arm.kind in ("composed", *OFFLINE)
    return rank_bucket(cell.rank + (cell.vector_rank if composed else 0))


def slot_bytes(arm: Arm, cell: Cell, artifacts: Artifacts) -> int:
    """LoRA slots as the flags size them: S slots x bucket x sum(D_in + D_out) x 2 bytes."""
    return cell.tenants * slot_rank(arm, cell) * artifacts.width * 2 if arm.has_tenants else 0


def command(arm: Arm, cell: Cell, artifacts: Artifacts, port: int) -> list[str]:
    """Command line that serves `arm`."""
    flags = ["--served-model-name", BASE, "--host", "127.0.0.1", "--port", str(port)]
    flags += [] if cell.compiled else ["--enforce-eager"]
    for name, value in cell.engine.items():
        flags += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    count = cell.tenants if arm.has_tenants else 0
    tenants = [f"t{i}={tenant_path(artifacts, arm, i)}" for i in range(count)]
    if tenants:
        flags += ["--enable-lora", "--max-loras", str(count), "--max-cpu-loras", str(count)]
        flags += ["--max-lora-rank", str(slot_rank(arm, cell))]
        flags += ["--lora-target-modules", *artifacts.target_modules()]
    if arm.kind in PROTECTED:
        flags += ["--worker-extension-cls", SWITCH] if is_switched(arm, cell) else []
        serve = [sys.executable, "-m", "safegene_vllm", "serve", str(artifacts.model)]
        serve += ["--family", str(artifacts.family(arm.layers)), "--apply", arm.kind]
        # The time to load weights is read from vLLM's log.
        serve += ["--verbose"]
        if arm.kind == "weights":
            serve += ["--profile", str(artifacts.checkpoint_profile(arm.layers))]
        for tenant in tenants:
            serve += ["--tenant", tenant]
        return [*serve, *flags]
    model = artifacts.merged(arm.layers) if arm.kind == "merged" else artifacts.model
    stock = [sys.executable, "-m", API_SERVER, "--model", str(model), *flags]
    stock += ["--lora-modules", *tenants] if tenants else []
    if arm.kind in PLUGIN:
        open_mode = {"family": None, "missing_profile": "serve_unprotected"}
        stock += ["--additional-config", json.dumps({"safegene": open_mode})]
    return stock


def environment(arm: Arm, threads: int) -> dict[str, str]:
    """Environment of the server: our plugins or none, equal threads for every engine."""
    path = [str(ROOT), str(ROOT / "server"), os.environ.get("PYTHONPATH")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "VLLM_PLUGINS": "safegene,safegene_server" if arm.kind in PLUGIN else "",
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
    }


def free_port() -> int:
    """A free port below the range of outgoing connections."""
    while True:
        port = random.SystemRandom().randrange(15000, 30000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@dataclass
class Server:
    """One arm's server. `start` returns its start-up times; `stop` ends all its processes."""

    arm: Arm
    cell: Cell
    artifacts: Artifacts
    threads: int
    log: Path
    url: str = ""
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    worker_state: str = "all"

    def start(self) -> dict[str, float]:
        """Start and wait until ready: `start_s` from the spawn, `load_weights_s` by vLLM's log.

        Raises: BenchError with the end of the log.
        """
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        arguments = command(self.arm, self.cell, self.artifacts, port)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                arguments,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment(self.arm, self.threads),
                start_new_session=True,
            )
        path = "/v1/safegene/ready" if self.arm.kind in PROTECTED else "/health"
        while time.perf_counter() - started < START_LIMIT_S and self.process.poll() is None:
            with suppress(httpx.HTTPError):
                if httpx.get(self.url + path, timeout=5).status_code == 200:
                    break
            time.sleep(0.1)
        else:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])
            self.stop()
            raise BenchError(f"{self.arm.name} did not start; the end of {self.log}:\n{tail}")
        found = {"start_s": time.perf_counter() - started}
        text = self.log.read_text(errors="replace")
        loaded = re.findall(r"Loading weights took ([\d.]+) seconds", text)
        return found | ({"load_weights_s": float(loaded[-1])} if loaded else {})

    def switch(self, state: str) -> None:
        """Put the worker into another arm's state. Raises: BenchError."""
        if not is_switched(self.arm, self.cell) or state == self.worker_state:
            return
        argument = str(self.artifacts.merged(self.arm.layers)) if state == "reloaded" else state
        method = "switch_weights" if self.arm.kind == "weights" else "switch_safety"
        self.call_worker(method, argument)
        self.worker_state = state

    def call_worker(self, method: str, *args: str) -> Any:
        """Call a method of the worker and return its result. Raises: BenchError."""
        body = {"method": method, "args": args}
        response = httpx.post(f"{self.url}/collective_rpc", json=body, timeout=START_LIMIT_S)
        if response.status_code != 200:
            raise BenchError(f"{self.arm.name}, {method} {args}: {response.text[:500]}")
        return response.json()["results"][0]

    def processes(self) -> list[psutil.Process]:
        """The server's process and its descendants."""
        with suppress(psutil.NoSuchProcess):
            if self.process is not None:
                top = psutil.Process(self.process.pid)
                return [top, *top.children(recursive=True)]
        return []

    def memory(self) -> dict[str, float]:
        """Resident bytes of all its processes; shared pages count per process.

        A protected arm adds `vector_bytes` by its receipts, one with tenants `slot_bytes`.
        """
        found = {"rss_bytes": float(sum(p.memory_info().rss for p in self.processes()))}
        if self.arm.kind in PROTECTED:
            response = httpx.get(f"{self.url}/v1/safegene/receipts", timeout=60)
            receipts = response.raise_for_status().json()["receipts"]
            found["vector_bytes"] = float(sum(r["vector_bytes"] for r in receipts))
        if self.arm.has_tenants:
            found["slot_bytes"] = float(slot_bytes(self.arm, self.cell, self.artifacts))
        return found

    def stop(self) -> None:
        """Terminate the server, by force if it does not end."""
        if self.process is None:
            return
        own = self.processes()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for process in psutil.wait_procs(own, timeout=10)[1]:
            process.kill()
        self.process = None


# vLLM's engine process polls while the worker computes and would take turns with it on its core;
# how often is chance and blurs a measurement on CPU by more than safety costs.


def core_shares(threads: int) -> tuple[set[int], set[int]]:
    """(the workers' cores, all other processes' cores); all for both if there are none to spare."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) <= threads:
        return set(cores), set(cores)
    return set(cores[-threads:]), set(cores[:-threads])


def pin_processes(processes: Iterable[psutil.Process], threads: int) -> None:
    """Pin every thread of a running server's processes to its cores."""
    workers, others = core_shares(threads)
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            cores = workers if process.name().startswith(WORKER) else others
            for thread in process.threads():
                with suppress(ProcessLookupError):
                    os.sched_setaffinity(thread.id, cores)


@contextmanager
def off_worker_cores(threads: int) -> Iterator[None]:
    """Keep this thread, and what it starts, off the workers' cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, core_shares(threads)[1])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
